"""Limits that the system itself sets, met in the middle of a run: a largest file, no inodes, a medium that has become
read-only, a folder that may no longer be changed. The save fails and says so, and works once the limit is gone.
"""

import os
import resource
import subprocess
from contextlib import contextmanager

import pytest

from megascale.checkpoint.folders import list_steps
from megascale.errors import SaveError
from tests.support.checkpoint_ranks import cut_flat, make_tensors
from tests.support.saving_ranks import SavingRanks

STATES = {step: cut_flat(make_tensors({"master/a": (70, 50)}, seed=step), [400_000]) for step in (3, 6, 9)}
WORLD_SIZE = 2


@pytest.fixture
def ranks():
    ranks = SavingRanks(WORLD_SIZE)
    yield ranks
    ranks.close()


def run_or_skip(*command):
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"{' '.join(map(str, command))}: {result.stderr.strip()}")


@contextmanager
def memory_disk(folder, options):
    folder.mkdir()
    run_or_skip("mount", "-t", "tmpfs", "-o", options, "none", folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def check_refused(ranks, run_folder, what):
    """Step 6 is refused on all ranks; nothing of it is left, and step 3 is."""
    outcomes = ranks.save(6, STATES[6])
    assert [type(outcome) for outcome in outcomes] == [SaveError] * WORLD_SIZE
    for outcome in outcomes:
        assert f"{run_folder}/checkpoints/step_00000006: not saved: " in str(outcome)
        assert what in str(outcome)
        assert "It needs 2.0 MiB, " in str(outcome)
    assert list_steps(run_folder) == [3]


def check_next_save(ranks, run_folder):
    assert ranks.save(9, STATES[9]) == [9] * WORLD_SIZE
    assert os.listdir(run_folder / "checkpoints") == ["step_00000009"]


def test_a_largest_file(ranks, tmp_path):
    """The signal that comes with it by default must not end the writer. Mutation: SIGXFSZ left to its default."""
    ranks.enter(tmp_path)
    assert ranks.save(3, STATES[3]) == [3] * WORLD_SIZE
    for rank in range(WORLD_SIZE):
        resource.prlimit(ranks.pid(rank), resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    check_refused(ranks, tmp_path, "File too large")
    for rank in range(WORLD_SIZE):
        resource.prlimit(ranks.pid(rank), resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    check_next_save(ranks, tmp_path)


def test_no_inodes(ranks, tmp_path):
    """Mutation: a message with free bytes alone, "63 MiB are free", and without the system's own words misleads."""
    with memory_disk(tmp_path / "disk", "size=64m,nr_inodes=9") as disk:
        ranks.enter(disk)
        assert ranks.save(3, STATES[3]) == [3] * WORLD_SIZE
        check_refused(ranks, disk, "No space left on device")
        run_or_skip("mount", "-o", "remount,nr_inodes=100", disk)
        check_next_save(ranks, disk)


def test_a_medium_that_has_become_read_only(ranks, tmp_path):
    """Mutation: an error while making the draft's folder that isn't caught ends the writer."""
    with memory_disk(tmp_path / "disk", "size=64m") as disk:
        ranks.enter(disk)
        assert ranks.save(3, STATES[3]) == [3] * WORLD_SIZE
        run_or_skip("mount", "-o", "remount,ro", disk)
        check_refused(ranks, disk, "Read-only file system")
        run_or_skip("mount", "-o", "remount,rw", disk)
        check_next_save(ranks, disk)


def test_a_folder_that_may_no_longer_be_changed(ranks, tmp_path):
    """Made immutable, which binds root too."""
    ranks.enter(tmp_path)
    assert ranks.save(3, STATES[3]) == [3] * WORLD_SIZE
    run_or_skip("chattr", "+i", tmp_path / "checkpoints")
    try:
        check_refused(ranks, tmp_path, "Operation not permitted")
    finally:
        subprocess.run(["chattr", "-i", tmp_path / "checkpoints"], check=True)
    check_next_save(ranks, tmp_path)
