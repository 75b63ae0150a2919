"""A save that dies, or is refused by the system, at every one of its file operations: the old or the new checkpoint
is found whole afterwards, and nothing has to be tidied by hand.

The operations are enumerated, not sampled: a first save counts them, then one save each is spoilt at operation
1, 2, 3, ... . Ranks are threads, so SIGKILL takes all of them; `Killed` takes one and leaves the others to notice.
"""

import errno
import os
import shutil
import signal
from collections import defaultdict

import pytest

from megascale.checkpoint.comm import LocalComm
from megascale.checkpoint.find import find_checkpoint
from megascale.checkpoint.folders import list_steps
from megascale.checkpoint.load import load_pieces
from megascale.checkpoint.local_store import LocalStore
from megascale.errors import CheckpointError, SaveError
from tests.support.checkpoint_ranks import PeerGoneError, cut_flat, equal_bits, make_tensors, save_all, zeros_like
from tests.support.file_faults import FileCalls, Killed, after_half, fail_with, run_forked, watched_files

SHAPES = {"master/a": (7, 5), "exp_avg/a": (7, 5), "exp_avg_sq/a": (7, 5)}
STATES = {step: cut_flat(make_tensors(SHAPES, seed=step), [400_000]) for step in (3, 6, 9)}
WORLD_SIZE = 2


def never(*_):
    raise AssertionError


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A run folder with the checkpoint of step 3; each case saves step 6 in a copy, keeping one."""
    folder = tmp_path_factory.mktemp("before")
    save_all(folder, 3, STATES[3])
    return folder


def count_calls(before, folder, rank=None):
    shutil.copytree(before, folder)
    with watched_files(FileCalls(0, never, rank)) as calls:
        save_all(folder, 6, STATES[6], keep_last=1)
    shutil.rmtree(folder)
    return calls.count


def check_old_or_new_is_whole(folder):
    """What a restarted job does: find, load, go on and save again."""
    found = find_checkpoint(LocalStore(folder), run_id="run-a", comm=LocalComm())
    step = found.index.state.step
    assert step in (3, 6)
    assert found.rejected == ()
    loaded = zeros_like(STATES[step])
    together = [piece for pieces in loaded for piece in pieces]
    load_pieces(found, together, comm=LocalComm())
    assert equal_bits(loaded, STATES[step])
    save_all(folder, 9, STATES[9], keep_last=1)
    assert os.listdir(folder / "checkpoints") == ["step_00000009"]
    return step


@pytest.mark.parametrize("tear_writes", [False, True], ids=["between", "within"])
def test_sigkill_at_every_operation(before, tmp_path, tear_writes):
    """Mutation: renaming the folder before the ranks' acknowledgements are in leaves a checkpoint without an index."""
    steps, last = [], count_calls(before, tmp_path / "count")
    for at in range(1, last + 2):
        folder = tmp_path / str(at)
        shutil.copytree(before, folder)

        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)

        def body(folder=folder, at=at, die=die):
            with watched_files(FileCalls(at, after_half(die) if tear_writes else die)):
                save_all(folder, 6, STATES[6], keep_last=1)

        assert run_forked(body) == (-signal.SIGKILL if at <= last else 0)
        steps.append(check_old_or_new_is_whole(folder))
    assert steps == sorted(steps)
    assert steps.count(3) > 20
    assert steps.count(6) > 5


@pytest.mark.parametrize("rank", range(WORLD_SIZE))
def test_one_rank_dies_at_every_one_of_its_operations(before, tmp_path, rank):
    """The others see a broken collective; rank 0 must not commit without the dead rank's acknowledgement."""
    for at in range(1, count_calls(before, tmp_path / "count", rank) + 1):
        folder = tmp_path / str(at)
        shutil.copytree(before, folder)

        def die(*_):
            raise Killed

        with watched_files(FileCalls(at, after_half(die), rank)):
            outcomes = save_all(folder, 6, STATES[6], keep_last=1)
        assert isinstance(outcomes[rank], Killed)
        assert isinstance(outcomes[1 - rank], PeerGoneError)
        check_old_or_new_is_whole(folder)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_an_error_at_every_operation(before, tmp_path, code):
    """Every rank raises the same kind of error with the path and the room, or the checkpoint is there."""
    failures = 0
    for at in range(1, count_calls(before, tmp_path / "count") + 1):
        folder = tmp_path / str(at)
        shutil.copytree(before, folder)
        with watched_files(FileCalls(at, fail_with(code))) as calls:
            outcomes = save_all(folder, 6, STATES[6], keep_last=1)
        assert len({type(outcome) for outcome in outcomes}) == 1, (calls.names, outcomes)
        if isinstance(outcomes[0], CheckpointError):
            failures += 1
            if calls.names[at - 1] != "close":  # shutil.rmtree closes a second time and reports that
                assert os.strerror(code) in str(outcomes[0])
            assert list_steps(folder)
            if 6 not in list_steps(folder):
                assert "step_00000006: not saved: " in str(outcomes[0])
                assert "MiB are free. The earlier checkpoints are untouched" in str(outcomes[0])
                assert os.listdir(folder / "checkpoints") == ["step_00000003"]
        check_old_or_new_is_whole(folder)
    assert failures > 30


def test_a_full_file_system(before, tmp_path):
    """A real one: a tmpfs with room for a part of the checkpoint, its size check switched off."""
    mount = tmp_path / "small"
    mount.mkdir()
    if run_mount("-t", "tmpfs", "-o", "size=64k", "none", str(mount)):
        pytest.skip("this user may not mount a tmpfs")
    try:
        big = cut_flat(make_tensors({"master/a": (200, 200)}), [100_000])
        small = cut_flat(make_tensors({"master/a": (20, 20)}), [100_000])
        assert "the disk is too full" in str(save_all(mount, 3, small)[0])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("megascale.checkpoint.local_store.free_bytes", lambda folder: 2**40)
            save_all(mount, 3, small)
            outcomes = save_all(mount, 6, big)
        assert [type(outcome) for outcome in outcomes] == [SaveError] * 2
        assert "No space left on device" in str(outcomes[0])
        assert find_checkpoint(LocalStore(mount), run_id="run-a", comm=LocalComm()).index.state.step == 3
        assert os.listdir(mount / "checkpoints") == ["step_00000003"]
    finally:
        os.spawnvp(os.P_WAIT, "umount", ["umount", str(mount)])


def run_mount(*arguments):
    return os.spawnvp(os.P_WAIT, "mount", ["mount", *arguments])


def test_everything_is_on_disk_before_the_rename_and_the_rename_before_the_deletion(before, tmp_path):
    """For power loss, where only what was synced remains. Mutation: leaving out any one sync fails it."""
    folder = tmp_path / "run"
    shutil.copytree(before, folder)
    dirty = defaultdict(set)
    opened, moves = {}, []

    class Journal(FileCalls):
        def call(self, name, real, args, kwargs):
            with self._guard:
                result = real(*args, **kwargs)
                note(name, args, result)
            return result

    def note(name, args, result):
        if name == "open":
            opened[result] = os.fspath(args[0])
            if len(args) > 1 and args[1] & os.O_CREAT:
                dirty[os.path.dirname(args[0])].add("name")
        elif name == "write":
            dirty[opened[args[0]]].add("content")
        elif name == "fsync":
            dirty.pop(opened[args[0]], None)
        elif name in ("mkdir", "unlink"):
            dirty[os.path.dirname(os.fspath(args[0]))].add("name")
        elif name == "rename":
            target = os.fspath(args[1])
            moves.append((os.path.basename(target), {path: set(what) for path, what in dirty.items()}))
            dirty[os.path.dirname(target)].add("name")

    with watched_files(Journal(0, never)):
        save_all(folder, 6, STATES[6], keep_last=1)
    (commit, unsynced), (trash, unsynced_later) = moves
    assert (commit, trash) == ("step_00000006", "step_00000003.trash")
    assert set(unsynced) == {str(folder / "checkpoints")}  # the name of the temporary folder itself
    assert not unsynced_later
