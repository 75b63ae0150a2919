"""Who is at fault, by what real ranks dump: their stacks and torch's flight recorder, over gloo."""

import os
import subprocess
import sys
import time

import pytest

from launcher.supervise.hang import HangKind, RankView, find_culprit, find_hang
from launcher.supervise.hang_report import write_hang_report
from launcher.supervise.rank_dumps import read_dumps
from megascale.config.cluster import LimitsConfig
from megascale.parallel.heartbeat import Beat, Phase
from tests.support.ranks import REPOSITORY, rank_environment

RANKS = 3


@pytest.mark.parametrize(("how", "kind"), [("skip", HangKind.STEP), ("other", HangKind.DESYNC)])
def test_the_rank_that_skips_a_collective_or_calls_another_is_named(how, kind, tmp_path):
    """gloo's state is `scheduled` for ever: only `retired` tells that a collective is over. Mutation seen to be caught:
    `retired` ignored."""
    pipes = [os.pipe() for _ in range(RANKS)]
    ranks = []
    try:
        for rank, (read_end, _) in enumerate(pipes):
            own = {"MEGASCALE_WATCH_FD": str(read_end), "MEGASCALE_DUMP_FOLDER": str(tmp_path),
                   "TORCH_FR_BUFFER_SIZE": "2000"}
            ranks.append(subprocess.Popen(
                [sys.executable, "-m", "tests.fault.programs.skipping_rank", str(tmp_path / "store"), "1", how],
                env=rank_environment(rank, RANKS, 0, on_gpu=False) | own, cwd=REPOSITORY, pass_fds=(read_end,),
                stdout=subprocess.PIPE, text=True,
            ))
        assert [process.stdout.readline() for process in ranks] == ["ready\n"] * RANKS
        time.sleep(1.0)  # the collectives after it
        for _, write_end in pipes:
            os.write(write_end, b"d")
        deadline_s = time.monotonic() + 30
        while len(list(tmp_path.glob("collectives_*.json"))) < RANKS and time.monotonic() < deadline_s:
            time.sleep(0.05)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
            process.stdout.close()
        for pair in pipes:
            for descriptor in pair:
                os.close(descriptor)
    dumps = read_dumps(tmp_path, RANKS)
    views = [RankView(rank, "n", Beat(Phase.COMPUTE, 1, 3, 0.0, 3, 0.1, 0.1, 0, -1), "S", 20.0, 0.0)
             for rank in range(RANKS)]
    hang = find_hang(views, LimitsConfig())
    blame = find_culprit(hang, views, dumps)
    assert (blame.kind, blame.ranks, blame.is_known) == (kind, (1,), True), blame
    write_hang_report(tmp_path / "report.md", hang, blame, views, dumps)
    text = (tmp_path / "report.md").read_text()
    assert "ranks 0, 2 wait in gloo:all_reduce [7], number 4 of group dp_cp" in text
    assert "skipping_rank.py" in text[text.index("### Rank 1"):]
