"""Which checkpoint is resumed, what happens to those that can't be, and when a run may start at step 0."""

import os
import shutil
from dataclasses import replace

import pytest

from megascale.checkpoint.comm import LocalComm
from megascale.checkpoint.files import hash_file
from megascale.checkpoint.find import DamagedCheckpointError, find_checkpoint, peek_checkpoint
from megascale.checkpoint.folders import checkpoint_path, list_steps, set_aside
from megascale.checkpoint.local_store import LocalStore
from megascale.errors import CheckpointError
from tests.support.checkpoint_ranks import RUN, cut_flat, make_tensors, run_ranks, save_all

RANKS = cut_flat(make_tensors({"master/a": (7, 5), "exp_avg/a": (7, 5)}), [500_000])


def find(run_folder, run_id="run-a"):
    return find_checkpoint(LocalStore(run_folder), run_id=run_id, comm=LocalComm())


@pytest.fixture
def run_folder(tmp_path):
    for step in (3, 6):
        save_all(tmp_path, step, RANKS)
    return tmp_path


def test_a_folder_that_never_had_a_checkpoint_starts_fresh(tmp_path):
    assert find(tmp_path) is None
    (tmp_path / "checkpoints" / "step_00000003.tmp-17").mkdir(parents=True)
    assert find(tmp_path) is None
    assert os.listdir(tmp_path / "checkpoints") == []


def test_the_newest_is_taken_and_leftovers_are_removed(run_folder):
    for name in ("step_00000009.tmp-4711", "step_00000001.trash"):
        shutil.copytree(checkpoint_path(run_folder, 6), run_folder / "checkpoints" / name)
    (run_folder / "checkpoints" / "notes").mkdir()
    assert find(run_folder).path.name == "step_00000006"
    assert sorted(os.listdir(run_folder / "checkpoints")) == ["notes", "step_00000003", "step_00000006"]


def test_a_damaged_one_is_quarantined_with_the_reason_and_the_one_before_is_taken(run_folder):
    (checkpoint_path(run_folder, 6) / "rank_00001.safetensors").write_bytes(b"")
    found = find(run_folder)
    assert found.path.name == "step_00000003"
    assert "step_00000006/rank_00001.safetensors: damaged: the index lists" in found.rejected[0]
    assert "found 0 bytes" in (run_folder / "quarantine" / "step_00000006" / "reason.txt").read_text()
    assert list_steps(run_folder) == [3]


def test_without_a_whole_one_the_run_never_starts_silently_at_step_0(run_folder):
    """Both are damaged; the refusal holds on the second try too, when `checkpoints/` is empty."""
    for step in (3, 6):
        (checkpoint_path(run_folder, step) / "index.json").unlink()
    with pytest.raises(CheckpointError, match=r"no whole checkpoint is left(?s:.)*step_00000003(?s:.)*--fresh"):
        find(run_folder)
    with pytest.raises(CheckpointError, match="--fresh"):
        find(run_folder)


def test_a_fresh_start_sets_everything_aside_and_deletes_nothing(run_folder):
    (checkpoint_path(run_folder, 6) / "index.json").unlink()
    find(run_folder)
    first = set_aside(run_folder)
    assert sorted(os.listdir(first)) == ["checkpoints", "quarantine"]
    assert find(run_folder) is None
    assert set_aside(run_folder) is None or not list_steps(run_folder)
    save_all(run_folder, 1, RANKS)
    assert set_aside(run_folder) != first
    assert find(run_folder) is None


def test_a_stale_higher_step_of_another_run_is_not_taken(run_folder):
    save_all(run_folder, 900, RANKS, run=replace(RUN, run_id="run-b"))
    found = find(run_folder)
    assert found.index.state.step == 6
    assert "belongs to run run-b, not to this run run-a" in found.rejected[0]


def test_any_run_is_taken_when_the_caller_does_not_know_the_run(run_folder):
    save_all(run_folder, 900, RANKS, run=replace(RUN, run_id="run-b"))
    assert find(run_folder, run_id=None).index.run.run_id == "run-b"


def test_a_checkpoint_under_the_name_of_another_step_is_not_taken(run_folder):
    shutil.copytree(checkpoint_path(run_folder, 3), checkpoint_path(run_folder, 7))
    found = find(run_folder)
    assert found.index.state.step == 6
    assert "is the checkpoint of step 3 under another name" in found.rejected[0]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_the_files_and_agree(run_folder, world_size):
    """The damaged file is in one rank's share only, yet all fall back; without the gather, one rank would resume 6."""
    (checkpoint_path(run_folder, 6) / "rank_00001.safetensors").write_bytes(b"x")
    found = run_ranks(world_size, lambda comm: find_checkpoint(LocalStore(run_folder), run_id="run-a", comm=comm))
    assert [one.index.state.step for one in found] == [3] * world_size
    assert all(one.rejected == found[0].rejected for one in found)


def test_peeking_changes_nothing_and_says_what_is_wrong(run_folder):
    (checkpoint_path(run_folder, 6) / "rank_00001.safetensors").unlink()
    (run_folder / "checkpoints" / "step_00000009.tmp-1").mkdir()
    before = sorted(path.relative_to(run_folder) for path in run_folder.rglob("*"))
    assert peek_checkpoint(LocalStore(run_folder)).index.state.step == 3
    assert peek_checkpoint(LocalStore(run_folder), step=3).index.state.step == 3
    with pytest.raises(CheckpointError, match=r"whole checkpoint of step 6; steps 3, 6 are there(?s:.)*no such file"):
        peek_checkpoint(LocalStore(run_folder), step=6)
    with pytest.raises(CheckpointError, match="there is none at all"):
        peek_checkpoint(LocalStore(run_folder / "elsewhere"))
    assert sorted(path.relative_to(run_folder) for path in run_folder.rglob("*")) == before


def test_a_file_that_may_not_be_read_is_no_damage(run_folder, monkeypatch):
    """Lack of permission stops the start; quarantining the checkpoint for it would lose a good one."""
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("megascale.checkpoint.local_store.hash_file", denied)
    with pytest.raises(CheckpointError, match="Permission denied") as refused:
        find(run_folder)
    assert not isinstance(refused.value, DamagedCheckpointError)
    assert list_steps(run_folder) == [3, 6]


def test_a_file_that_the_disk_can_not_read_is_damage(run_folder, monkeypatch):
    real = hash_file

    def broken(path):
        if "step_00000006" in str(path):
            raise OSError(5, "Input/output error", str(path))
        return real(path)

    monkeypatch.setattr("megascale.checkpoint.local_store.hash_file", broken)
    assert find(run_folder).index.state.step == 3
