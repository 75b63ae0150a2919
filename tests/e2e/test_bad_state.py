"""Run folders in a bad state: another run's, damaged checkpoints, a full disk."""

import shutil
import subprocess
from pathlib import Path

import pytest

from megascale.errors import EXIT_OK, EXIT_RUN, EXIT_USER
from tests.e2e.test_bad_input import check_message, check_refused
from tests.support.faulty_run import NUM_STEPS, assert_same_end, checkpoint_names, faulty_run
from tests.support.tiny_run import curve, megascale, write_config

ROOM_FOR_ONE_KIB = 2500
"""One checkpoint of the tiny run takes 0.3 MiB, and each save asks for that and 1 MiB a rank to spare."""


@pytest.fixture
def copied(corpus, clean, tmp_path) -> Path:
    """The config of a run whose folder is a copy of the undisturbed run's."""
    shutil.copytree(clean, tmp_path / "run")
    return write_config(tmp_path, corpus)


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_run_folder_of_another_config_or_corpus(copied, tmp_path):
    """Nothing is resumed, nothing overwritten, and the folder is released.

    Mutations seen to be caught: the configs aren't compared; a run that is refused keeps its lease.
    """
    arguments = ["train", copied, "run.seed=4", "optimizer.learning_rate=1e-3", "train.micro_batch_size=4"]
    parts = ["another config or corpus", "run.seed = 3 then, 4 now", "optimizer.learning_rate = 0.003 then, 0.001 now",
             "give the changed run a folder of its own (run.folder)"]
    check_refused([*arguments, "--nproc", "2"], parts, tmp_path)


def test_damaged_newest_checkpoints_are_passed_over(copied, clean, tmp_path):
    """One with a flipped bit and one half written: the run goes on from the one before, and ends as it had.

    Mutation seen to be caught: hashes aren't compared.
    """
    checkpoints = tmp_path / "run" / "checkpoints"
    flip_bit(checkpoints / f"step_{NUM_STEPS:08d}" / "rank_00001.safetensors")
    (checkpoints / "step_00000009" / "rank_00000.safetensors").unlink()
    done = megascale("train", copied, "--nproc", "2")
    assert done.returncode == EXIT_OK, done.stderr
    warnings = [line for line in done.stdout.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2
    assert f"damaged checkpoint: {checkpoints}/step_{NUM_STEPS:08d}/rank_00001.safetensors" in warnings[0]
    assert f"damaged checkpoint: {checkpoints}/step_00000009/rank_00000.safetensors" in warnings[1]
    assert f"resuming from {checkpoints}/step_00000006 at step 6" in done.stdout
    assert_same_end(tmp_path / "run", clean)


def test_without_a_whole_checkpoint_only_fresh_starts_anew(copied, clean, tmp_path):
    """Never silently from step 0, also when asked twice; the damaged ones and the old metrics are kept aside.

    Mutations seen to be caught: the quarantine is forgotten; old metrics stay in place.
    """
    run_folder = tmp_path / "run"
    for name in checkpoint_names(run_folder):
        flip_bit(run_folder / "checkpoints" / name / "rank_00000.safetensors")
    old_curve = curve(run_folder)
    for _ in range(2):
        done = megascale("train", copied, "--nproc", "2")
        assert done.returncode == EXIT_USER, done.stderr
        check_message(done.stderr, [f"{run_folder}: no whole checkpoint is left", "--fresh"])
        assert curve(run_folder) == old_curve
    done = megascale("train", copied, "--nproc", "2", "--fresh")
    assert done.returncode == EXIT_OK, done.stderr
    assert "resuming" not in done.stdout
    assert_same_end(run_folder, clean)
    aside = run_folder / "set_aside" / "1"
    assert len(list((aside / "quarantine").iterdir())) == 3
    assert curve(aside) == old_curve


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again_unasked(copied, tmp_path):
    """A file system that isn't mounted, an object store at another endpoint.

    Mutation seen to be caught: what the run folder notes of its saves isn't looked at.
    """
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "checkpoints").mkdir()
    parts = [f"{tmp_path / 'run'}: holds no checkpoint, though this run saved one at step {NUM_STEPS}", "--fresh"]
    check_refused(["train", copied, "--nproc", "2"], parts, tmp_path)


@pytest.fixture
def small_disk(corpus, tmp_path):
    """A file system with room for one checkpoint, and a config whose run folder is on it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={ROOM_FOR_ONE_KIB}k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    write_config(disk, corpus)
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk_does_not_stop_training(small_disk, clean, tmp_path):
    """The save of step 6 finds no room; there is some again by step 9, and the run ends as it would have.

    Mutation seen to be caught: a failed save always ends the run.
    """
    with faulty_run("paused_rank", tmp_path / "plan", {"phase": "forward", "step": 7}, small_disk / "run.yaml") as run:
        run.wait_for_pause()
        assert f"{small_disk}/run/checkpoints/step_00000006: not saved: the disk is too full" in run.text()
        assert checkpoint_names(small_disk / "run") == ["step_00000003"]
        subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
        run.go_on()
        assert run.end() == EXIT_OK, run.text()
    assert_same_end(small_disk / "run", clean)


@pytest.mark.parametrize(("policy", "step"), [("stop", 6), ("continue", NUM_STEPS)])
def test_a_full_disk_stops_by_policy_and_at_the_end(small_disk, policy, step):
    """A run whose last state can't be saved hasn't succeeded. The earlier checkpoint stays, and can be resumed.

    Mutation seen to be caught: the failure of the last save is passed over.
    """
    config = small_disk / "run.yaml"
    done = megascale(
        "train", config, f"checkpoint.on_save_error={policy}", "checkpoint.asynchronous=false", "--nproc", "2"
    )
    assert done.returncode == EXIT_RUN, done.stderr
    check_message(done.stderr, [f"run/checkpoints/step_{step:08d}: not saved: the disk is too full", "MiB are free",
                                "The earlier checkpoints are untouched"])
    assert checkpoint_names(small_disk / "run") == ["step_00000003"]
    assert curve(small_disk / "run")[-1][1] == step
