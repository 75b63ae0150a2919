"""A rank's process as its agent sees it."""

import os
import sys
import time

from launcher.supervise import rank_process
from launcher.supervise.rank_process import CGROUPS, RankProcess


def test_the_memory_group_of_a_dying_process_is_remembered(tmp_path, monkeypatch):
    """The kernel shows the root group for a process that has begun to exit, which a large one does for a while.

    Mutation that must fail it: taking whatever group the last look found.
    """
    own, seen = tmp_path / "group", []
    monkeypatch.setattr(rank_process, "memory_cgroup", lambda pid: seen[-1] if seen else own)
    monkeypatch.setattr(rank_process, "oom_kills", lambda group: 1 if group == own and seen else 0)
    rank = RankProcess(3, [sys.executable, "-c", "import time; time.sleep(60)"], dict(os.environ), tmp_path,
                       tmp_path / "beat", ())
    seen.append(CGROUPS / "memory")
    rank.look()
    rank.kill()
    while rank.code is None:
        time.sleep(0.01)
    assert rank.describe_end()["oom"] == {"limit_bytes": None, "peak_bytes": None}
