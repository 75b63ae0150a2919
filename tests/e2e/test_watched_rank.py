"""A rank and who watches it: heartbeat, dumps on request, the agent's death, and leftovers of an earlier attempt."""

import json
import os
import signal
import time

import pytest

from megascale.errors import EXIT_PEER_LOST
from megascale.parallel.heartbeat import Phase
from megascale.train.watch import ORPHAN_S
from tests.support.faulty_run import NUM_STEPS, assert_same_end, child_pids, wait_until
from tests.support.ranks import run_ranks
from tests.support.tiny_run import write_config
from tests.support.watched_ranks import watched_ranks

RANK = "megascale.train.rank"
PAUSED = "tests.e2e.programs.paused_rank"


@pytest.fixture
def config(corpus, tmp_path):
    return write_config(tmp_path, corpus)


def test_a_watched_run_is_the_same_run_and_tells_where_it_is(config, clean, tmp_path):
    """Mutations seen to be caught: `end_step` left out; `note_saved` left out."""
    with watched_ranks(RANK, tmp_path / "watch", [config]) as ranks:
        wait_until(lambda: ranks.beat(1) is not None and ranks.beat(1).step >= 0, ranks.text)
        assert ranks.wait(60) == [0, 0], ranks.text()
        for rank in (0, 1):
            beat = ranks.beat(rank)
            assert (beat.phase, beat.step, beat.steps_taken) == (Phase.CLOSE, NUM_STEPS, NUM_STEPS)
            assert beat.saved_step == NUM_STEPS
            assert 0 < beat.compute_s < beat.slowest_step_s
            assert beat.first_row == (NUM_STEPS - 1) * 8
    assert_same_end(tmp_path / "run", clean)


def test_dumps_are_made_when_asked_for_and_an_orphan_ends(config, tmp_path):
    """Mutations seen to be caught: no end when the pipe ends; groups without names; no stacks by signal."""
    folder = tmp_path / "watch"
    plan = folder / "plan.json"
    folder.mkdir()
    plan.write_text(json.dumps({"folder": str(folder), "phase": "forward", "step": 4}))
    with watched_ranks(PAUSED, folder, [config], MEGASCALE_TEST_PLAN=str(plan), TORCH_FR_BUFFER_SIZE="2000") as ranks:
        wait_until(lambda: all((folder / f"paused_{rank}").exists() for rank in (0, 1)), ranks.text)
        assert [ranks.beat(rank).phase for rank in (0, 1)] == [Phase.COMPUTE] * 2
        assert [ranks.beat(rank).step for rank in (0, 1)] == [4, 4]
        ranks.ask_for_dump()
        for rank, process in enumerate(ranks.processes):
            stacks = (folder / f"stacks_{rank:05d}.txt").read_text()
            assert "in phase compute" in stacks
            assert "in take_step" in stacks
            entries = json.loads((folder / f"collectives_{rank:05d}.json").read_text())["entries"]
            assert {"control", "dp_cp"} <= {entry["process_group"][1] for entry in entries}
            writer, = child_pids(process.pid)
            assert os.stat(f"/proc/{process.pid}/fd/{pipe_of(process.pid)}").st_ino not in inodes_of(writer)
            process.send_signal(signal.SIGUSR2)
            wait_until(lambda path=folder / f"stacks_{rank:05d}.txt": path.read_text().count("in take_step") == 2)
        ranks.let_go()
        start = time.monotonic()
        assert ranks.wait(ORPHAN_S + 5) == [EXIT_PEER_LOST] * 2
        assert time.monotonic() - start < ORPHAN_S + 1


def pipe_of(pid: int) -> int:
    """The descriptor by which a rank listens."""
    with open(f"/proc/{pid}/environ", "rb") as file:
        variables = dict(line.partition(b"=")[::2] for line in file.read().split(b"\0"))
    return int(variables[b"MEGASCALE_WATCH_FD"])


def inodes_of(pid: int) -> set[int]:
    """Of all files that a process has open."""
    return {os.stat(f"/proc/{pid}/fd/{name}").st_ino for name in os.listdir(f"/proc/{pid}/fd")}


def test_a_leftover_of_an_earlier_attempt_is_refused(tmp_path):
    """A rank of an earlier attempt comes first to the store of the new one; the new one's ranks meet all the same.

    Mutation seen to be caught: no check.
    """
    leftover = run_ranks("tests.dist.programs.incarnations", 2, [str(tmp_path)], tmp_path)[1]
    assert leftover.startswith("rank 1 belongs to attempt job.0.1, but the store at 127.0.0.1:"), leftover
    assert "serves attempt job.0.2: a leftover of an earlier attempt; it was refused" in leftover
