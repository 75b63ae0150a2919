"""Saves beside training: the state changes under them, writers die, stop and are late, and ranks die.

A writer that is stopped (SIGSTOP) is one that is as slow as the test wants.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megascale.checkpoint.comm import LocalComm
from megascale.checkpoint.find import find_checkpoint
from megascale.checkpoint.folders import list_steps
from megascale.checkpoint.load import load_pieces
from megascale.checkpoint.local_store import LocalStore
from megascale.checkpoint.writer import BLOCKED
from megascale.errors import SaveError
from tests.support.checkpoint_ranks import cut_flat, equal_bits, make_tensors, state_at, zeros_like
from tests.support.saving_ranks import SavingRanks, wait_until

SHAPES = {"master/a": (7, 5), "exp_avg/a": (7, 5), "exp_avg_sq/a": (7, 5)}
WORLD_SIZE = 2
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def states():
    return {step: cut_flat(make_tensors(SHAPES, seed=step), [400_000]) for step in (3, 6, 9)}


@pytest.fixture
def ranks(tmp_path, states):
    """Ranks that have saved step 3, so each has a writer."""
    ranks = SavingRanks(WORLD_SIZE)
    ranks.enter(tmp_path)
    assert ranks.save(3, states[3]) == [3] * WORLD_SIZE
    yield ranks
    ranks.close()


def send(ranks, number):
    for rank in range(WORLD_SIZE):
        os.kill(ranks.pid(rank), number)


def start(ranks, step, pieces):
    return ranks.each(lambda rank: ranks.savers[rank].start(state_at(step), pieces[rank]))


def take_step(ranks):
    """What ranks do once a step."""
    reports = [saver.report() for saver in ranks.savers]
    num_done, num_failed = (sum(flags) for flags in zip(*reports, strict=True))
    return ranks.each(lambda rank: ranks.savers[rank].advance(num_done, num_failed))


def is_gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def check_saved(run_folder, step, pieces):
    found = find_checkpoint(LocalStore(run_folder), run_id="run-a", comm=LocalComm())
    assert found.step == step
    loaded = zeros_like(pieces)
    load_pieces(found, [piece for rank in loaded for piece in rank], comm=LocalComm())
    assert equal_bits(loaded, pieces)


def test_the_state_may_change_once_start_returns(ranks, states, tmp_path):
    """Mutation: `_stage` without its copy saves the bits of step 3 under step 6."""
    send(ranks, signal.SIGSTOP)
    pieces = cut_flat(make_tensors(SHAPES, seed=6), [400_000])
    start(ranks, 6, pieces)
    for piece in (piece for rank in pieces for piece in rank):
        piece.tensor.add_(1)
    send(ranks, signal.SIGCONT)
    assert ranks.finish() == [6] * WORLD_SIZE
    check_saved(tmp_path, 6, states[6])


def test_two_saves_at_once_are_refused_and_the_first_is_whole(ranks, states, tmp_path):
    """Mutation: without the check in `start`, the second save overwrites the memory that the first is written from."""
    send(ranks, signal.SIGSTOP)
    start(ranks, 6, states[6])
    assert [str(error) for error in start(ranks, 9, states[9])] == ["step 6 is still being saved"] * WORLD_SIZE
    send(ranks, signal.SIGCONT)
    assert ranks.finish() == [6] * WORLD_SIZE
    check_saved(tmp_path, 6, states[6])


@pytest.mark.parametrize(("rank", "phase"), [(0, "write"), (1, "write"), (0, "commit")])
def test_a_writer_that_is_killed(ranks, states, tmp_path, rank, phase):
    """All ranks raise at the same step, and the next save works.

    Mutation: counting the task that nobody carried out, as `submit` once did, makes the next save wait for ever.
    """
    if phase == "write":
        os.kill(ranks.pid(rank), signal.SIGSTOP)
        start(ranks, 6, states[6])
    else:
        start(ranks, 6, states[6])
        wait_until(lambda: all(saver.report()[0] for saver in ranks.savers))
        os.kill(ranks.pid(rank), signal.SIGSTOP)
    assert take_step(ranks) == take_step(ranks) == [None] * WORLD_SIZE
    os.kill(ranks.pid(rank), signal.SIGKILL)
    outcomes = [None] * WORLD_SIZE

    def is_told():
        outcomes[:] = take_step(ranks)
        return outcomes != [None] * WORLD_SIZE

    wait_until(is_told)
    assert [type(outcome) for outcome in outcomes] == [SaveError] * WORLD_SIZE
    assert "the process that writes checkpoints was killed by SIGKILL" in str(outcomes[rank])
    assert f"rank {rank} failed" in str(outcomes[1 - rank])
    assert list_steps(tmp_path) == [3]
    assert ranks.save(9, states[9]) == [9] * WORLD_SIZE
    assert os.listdir(tmp_path / "checkpoints") == ["step_00000009"]
    check_saved(tmp_path, 9, states[9])


def test_a_writer_that_dies_with_nothing_to_do_costs_no_save(ranks, states, tmp_path):
    """Mutation: without `poll` in `_ensure_process`, the next save fails."""
    for rank in range(WORLD_SIZE):
        os.kill(ranks.pid(rank), signal.SIGKILL)
        wait_until(lambda rank=rank: is_gone(ranks.pid(rank)))
    assert ranks.save(6, states[6]) == [6] * WORLD_SIZE
    check_saved(tmp_path, 6, states[6])


@pytest.mark.parametrize("number", BLOCKED)
def test_signals_for_the_whole_job_end_no_save(tmp_path, states, number):
    """While a writer starts, too. Mutation: ignoring them in its `main` is too late; each of them kills it."""
    ranks = SavingRanks(WORLD_SIZE)
    ranks.enter(tmp_path)
    for step in (3, 6):
        start(ranks, step, states[step])
        send(ranks, number)
        assert ranks.finish() == [step] * WORLD_SIZE
        send(ranks, number)
    ranks.close()


def test_a_late_save_is_given_up_and_the_next_one_works(ranks, states, tmp_path):
    """Mutation: taking the late save's answer for the next one's makes that one fail."""
    os.kill(ranks.pid(1), signal.SIGSTOP)
    start(ranks, 6, states[6])
    outcomes = ranks.finish(patience_s=0.2)
    assert [type(outcome) for outcome in outcomes] == [SaveError] * WORLD_SIZE
    assert "step_00000006: not saved within the time given: ranks are writing" in str(outcomes[0])
    assert list_steps(tmp_path) == [3]
    os.kill(ranks.pid(1), signal.SIGCONT)
    assert ranks.save(9, states[9]) == [9] * WORLD_SIZE
    check_saved(tmp_path, 9, states[9])


def test_closing_leaves_no_process_behind(ranks, states):
    """Not even one that is stopped. Mutation: `close` with SIGTERM, which a writer doesn't get."""
    pids = [ranks.pid(rank) for rank in range(WORLD_SIZE)]
    send(ranks, signal.SIGSTOP)
    start(ranks, 6, states[6])
    ranks.close()
    assert all(is_gone(pid) for pid in pids)


def test_a_writer_dies_with_its_rank_and_commits_nothing(tmp_path):
    """Mutation: without `signal_when_parent_dies` the stopped writer stays."""
    program = "tests.fault.programs.saving_rank"
    rank = subprocess.Popen([sys.executable, "-m", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        pid = int(rank.stdout.readline())
        assert not is_gone(pid)
    finally:
        rank.kill()
        rank.communicate()
    try:
        wait_until(lambda: is_gone(pid), patience_s=5)
    finally:
        if not is_gone(pid):
            os.kill(pid, signal.SIGKILL)
    assert list_steps(tmp_path) == [3]
