"""Saves by real writer processes, spoilt at every one of their file calls: the old or the new checkpoint is found whole
afterwards, with no manual step, and the next save works.

A save without a fault tells the calls; then each call of each rank is a case: the process is killed when about to make
it, or the call fails. `test_checkpoint_kill.py` tears single writes in two as well.
"""

import os
from errno import EIO, ENOSPC

import pytest

from megascale.checkpoint.comm import LocalComm
from megascale.checkpoint.find import find_checkpoint
from megascale.checkpoint.load import load_pieces
from megascale.checkpoint.local_store import LocalStore
from megascale.errors import SaveError
from tests.support.checkpoint_ranks import cut_flat, equal_bits, make_tensors, zeros_like
from tests.support.saving_ranks import SavingRanks
from tests.support.strace import INJECTED, STRACE, Call, fail_at, kill_at, read_calls, traced

SHAPES = {"master/a": (7, 5), "exp_avg/a": (7, 5), "exp_avg_sq/a": (7, 5)}
STATES = {step: cut_flat(make_tensors(SHAPES, seed=step), [400_000]) for step in (3, 6, 9)}
WORLD_SIZE = 2
NUMBERS = {"ENOSPC": ENOSPC, "EIO": EIO}
ANSWER = "1<pipe:"

pytestmark = pytest.mark.skipif(STRACE is None, reason="strace is not installed; it makes single system calls fail")


@pytest.fixture(scope="module")
def ranks():
    ranks = SavingRanks(WORLD_SIZE)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def calls(ranks, tmp_path_factory):
    """Of each rank, the file calls of a save of step 6 that deletes step 3, and its answers."""
    return [count_calls(ranks, rank, tmp_path_factory.mktemp("count")) for rank in range(WORLD_SIZE)]


def count_calls(ranks, rank, folder):
    run_folder, log = folder / "run", folder / "log"
    assert save_with_fault(ranks, rank, None, run_folder, log) == [6] * WORLD_SIZE
    return [call for call in read_calls(log) if str(run_folder) in call.text or call.text.startswith(ANSWER)]


def save_with_fault(ranks, rank, fault, run_folder, log):
    """Saves step 3, and then step 6 with a fault in one rank's writer."""
    ranks.enter(run_folder)
    assert ranks.save(3, STATES[3]) == [3] * WORLD_SIZE
    with traced(ranks.pid(rank), log, fault):
        return ranks.save_in_turn(6, STATES[6])


def check_old_or_new_is_whole(run_folder):
    """What a restarted job does: find and load."""
    found = find_checkpoint(LocalStore(run_folder), run_id="run-a", comm=LocalComm())
    assert found.step in (3, 6)
    assert found.rejected == ()
    loaded = zeros_like(STATES[found.step])
    load_pieces(found, [piece for pieces in loaded for piece in pieces], comm=LocalComm())
    assert equal_bits(loaded, STATES[found.step])
    return found.step


def check_next_save(ranks, run_folder):
    assert ranks.save(9, STATES[9]) == [9] * WORLD_SIZE
    assert os.listdir(run_folder / "checkpoints") == ["step_00000009"]


def run_kill(ranks, rank, call: Call, folder) -> int:
    """Kills one rank's writer at a call; gives the step that is found then."""
    outcomes = save_with_fault(ranks, rank, kill_at(call), folder / "run", folder / "log")
    last = read_calls(folder / "log")[-1]
    assert (last.kind, last.number) == (call.kind, call.number)
    assert [type(outcome) for outcome in outcomes] == [SaveError] * WORLD_SIZE, (call, outcomes)
    assert "was killed by SIGKILL" in str(outcomes[rank])
    assert f"rank {rank} failed" in str(outcomes[1 - rank])
    step = check_old_or_new_is_whole(folder / "run")
    check_next_save(ranks, folder / "run")
    return step


def run_error(ranks, rank, call: Call, error: str, folder) -> bool:
    """Lets one call fail; gives whether the save failed."""
    outcomes = save_with_fault(ranks, rank, fail_at(call, error), folder / "run", folder / "log")
    hit, = (one for one in read_calls(folder / "log") if INJECTED in one.text)
    assert (hit.kind, hit.number) == (call.kind, call.number)
    assert str(folder / "run") in hit.text
    step = check_old_or_new_is_whole(folder / "run")
    if outcomes == [6] * WORLD_SIZE:
        assert step == 6
    else:
        assert [type(outcome) for outcome in outcomes] == [SaveError] * WORLD_SIZE, (call, outcomes)
        for outcome in outcomes:
            assert f"{folder / 'run'}/checkpoints/step_00000006: not saved: " in str(outcome)
            assert os.strerror(NUMBERS[error]) in str(outcome), call
            assert "It needs 2.0 MiB, " in str(outcome)
            assert "MiB are free. The earlier checkpoints are untouched" in str(outcome)
    check_next_save(ranks, folder / "run")
    return outcomes != [6] * WORLD_SIZE


def is_changing(call: Call) -> bool:
    """Whether a call changes what is on disk."""
    return call.kind in ("write", "fsync", "rename", "mkdir", "unlink", "unlinkat", "rmdir") or "O_CREAT" in call.text


def of_folder(calls):
    return [call for call in calls if not call.text.startswith(ANSWER)]


def first_of_each_kind(calls):
    return {call.kind: call for call in reversed(calls)}.values()


def check_kills(ranks, rank, calls, folder):
    steps = []
    for number, call in enumerate(calls):
        (folder / str(number)).mkdir()
        steps.append(run_kill(ranks, rank, call, folder / str(number)))
    assert steps == sorted(steps)
    return steps


def check_errors(ranks, rank, calls, error, folder):
    """Gives the calls without which the save failed."""
    failed = []
    for number, call in enumerate(calls):
        (folder / str(number)).mkdir()
        if run_error(ranks, rank, call, error, folder / str(number)):
            failed.append(call)
    return failed


def test_sigkill_around_the_commit(ranks, calls, tmp_path):
    """A part of the next test: rank 0 about to rename, to sync the rename, to delete; rank 1 about to acknowledge.

    Mutation: renaming the draft before the index is written leaves a step 6 that isn't whole.
    """
    commit = next(i for i, call in enumerate(calls[0]) if call.kind == "rename")
    around = [call for call in calls[0][commit - 3 :] if is_changing(call)]
    steps = check_kills(ranks, 0, around, tmp_path)
    assert set(steps) == {3, 6}
    (tmp_path / "rank 1").mkdir()
    assert set(check_kills(ranks, 1, calls[1][-3:], tmp_path / "rank 1")) == {3}


@pytest.mark.slow
@pytest.mark.parametrize("rank", range(WORLD_SIZE))
def test_sigkill_at_every_call(ranks, calls, tmp_path, rank):
    """The whole of the test above, and its mutation."""
    steps = check_kills(ranks, rank, calls[rank], tmp_path)
    assert steps.count(3) > 25
    assert (steps.count(6) > 20) == (rank == 0)


@pytest.mark.parametrize("rank", range(WORLD_SIZE))
def test_an_error_at_each_changing_call(ranks, calls, tmp_path, rank):
    """A part of the next test. Mutation: swallowing the error of fsync in `write_durably` saves step 6 all the same."""
    changing = [call for call in of_folder(calls[rank]) if is_changing(call)]
    failed = check_errors(ranks, rank, changing, "EIO", tmp_path)
    commit = next((i for i, call in enumerate(changing) if call.kind == "rename"), len(changing))
    until_safe = [call for call in changing[: commit + 2] if call.kind != "mkdir"]  # the folder may be there already
    assert len(until_safe) > 5
    assert [call for call in until_safe if call not in failed] == []


@pytest.mark.slow
@pytest.mark.parametrize("error", NUMBERS)
@pytest.mark.parametrize("rank", range(WORLD_SIZE))
def test_an_error_at_every_call(ranks, calls, tmp_path, rank, error):
    """The save fails on all ranks with place, need and room, or the call didn't matter and it is whole."""
    assert len(check_errors(ranks, rank, of_folder(calls[rank]), error, tmp_path)) > 15


@pytest.mark.parametrize("rank", range(WORLD_SIZE))
def test_a_disk_that_fails_for_good(ranks, calls, tmp_path, rank):
    """From the first write, sync or rename on, all fail. Linux reports a lost write to one fsync only, and the next one
    succeeds, so a file is never synced twice.

    Mutation: trying `os.fsync` a second time in `write_durably`.
    """
    for call in first_of_each_kind([call for call in calls[rank] if call.kind in ("write", "fsync", "rename")]):
        folder = tmp_path / call.kind
        folder.mkdir()
        outcomes = save_with_fault(ranks, rank, f"{fail_at(call, 'EIO')}+", folder / "run", folder / "log")
        assert [type(outcome) for outcome in outcomes] == [SaveError] * WORLD_SIZE
        synced = [one.text.partition(")")[0] for one in read_calls(folder / "log") if one.kind == "fsync"]
        files = [name for name in synced if name.rstrip(">").endswith((".safetensors", ".json", "SHA256SUMS"))]
        assert len(set(files)) == len(files)
        assert check_old_or_new_is_whole(folder / "run") == 3
        check_next_save(ranks, folder / "run")
