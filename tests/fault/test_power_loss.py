"""The power is cut at every file operation of a save, on a real disk image: after a restart the old or the new
checkpoint is there, whole. Only what was synced survives.

ext4 syncs the names of all folders with any file's, so a folder's sync left out doesn't show here; for that
`test_checkpoint_kill.py` keeps a journal of what is unsynced at each rename.
"""

import os
import shutil

import pytest

from megascale.checkpoint.comm import LocalComm
from megascale.checkpoint.find import find_checkpoint
from megascale.checkpoint.load import load_pieces
from megascale.checkpoint.local_store import LocalStore
from tests.support.checkpoint_ranks import cut_flat, equal_bits, make_tensors, save_all, zeros_like
from tests.support.file_faults import FileCalls, watched_files
from tests.support.loop_disk import NoLoopDiskError, make_disk, mounted

STATES = {step: cut_flat(make_tensors({"master/a": (70, 50)}, seed=step), [400_000]) for step in (3, 6, 9)}


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """A disk with a checkpoint of step 3."""
    folder = tmp_path_factory.mktemp("disk")
    try:
        make_disk(folder / "image")
        with mounted(folder / "image", folder / "mount"):
            save_all(folder / "mount" / "run", 3, STATES[3])
    except NoLoopDiskError as error:
        pytest.skip(f"no disk to cut the power of: {error}")
    return folder / "image"


def save_until_power_cut(image, mount, at, keep_last):
    """Saves step 6, and cuts the power at a file operation or, where there are fewer, afterwards; gives whether it was
    at one."""
    with mounted(image, mount) as disk:

        def cut(name, real, args, kwargs):
            disk.cut_power()
            return real(*args, **kwargs)

        with watched_files(FileCalls(at, cut)) as calls:
            outcomes = save_all(mount / "run", 6, STATES[6], keep_last=keep_last)
        if calls.count < at:
            assert outcomes == [mount / "run" / "checkpoints" / "step_00000006"] * 2
            disk.cut_power()
    return calls.count >= at


def check_restart(image, mount):
    """The step that is found, loads whole, and is followed by a save."""
    with mounted(image, mount):
        found = find_checkpoint(LocalStore(mount / "run"), run_id="run-a", comm=LocalComm())
        assert found.rejected == ()
        loaded = zeros_like(STATES[found.step])
        load_pieces(found, [piece for pieces in loaded for piece in pieces], comm=LocalComm())
        assert equal_bits(loaded, STATES[found.step])
        save_all(mount / "run", 9, STATES[9], keep_last=1)
        assert os.listdir(mount / "run" / "checkpoints") == ["step_00000009"]
    return found.step


def test_power_loss_at_every_operation(image, tmp_path):
    """Mutation: `write_durably` without its fsync leaves a step 6 with an empty file."""
    copy, mount, steps, is_cut = tmp_path / "image", tmp_path / "mount", [], True
    while is_cut:
        shutil.copyfile(image, copy)
        is_cut = save_until_power_cut(copy, mount, len(steps) + 1, keep_last=1)
        steps.append(check_restart(copy, mount))
    assert steps == sorted(steps)
    assert steps.count(3) > 20
    assert steps.count(6) > 5


def test_a_save_that_was_reported_survives(image, tmp_path):
    """With nothing deleted afterwards, which would sync too. Mutation: `move_durably` without its sync."""
    copy = tmp_path / "image"
    shutil.copyfile(image, copy)
    assert not save_until_power_cut(copy, tmp_path / "mount", 1_000_000, keep_last=2)
    assert check_restart(copy, tmp_path / "mount") == 6
