"""Resuming with a changed config, and new runs from old checkpoints, through the command line."""

import json
import shutil
from pathlib import Path

import pytest

from megascale.checkpoint.find import peek_checkpoint
from megascale.checkpoint.local_store import LocalStore
from megascale.errors import EXIT_OK, EXIT_USER
from tests.e2e.test_bad_input import check_message
from tests.support.tiny_run import curve, megascale, read_metrics, write_config

RATE = "optimizer.learning_rate=1e-3"
ALLOW_RATE = ("--allow-change", "optimizer.learning_rate")


@pytest.fixture
def copied(corpus, clean, tmp_path) -> Path:
    """The config of a run that stands at step 6 of 12, copied from the undisturbed run."""
    shutil.copytree(clean, tmp_path / "run")
    for step in (9, 12):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step:08d}")
    return write_config(tmp_path, corpus)


def train(*arguments, code: int = EXIT_OK):
    done = megascale("train", *arguments, "--nproc", "2")
    assert done.returncode == code, done.stdout + done.stderr
    return done


def run_of(run_folder: Path):
    return peek_checkpoint(LocalStore(run_folder)).index.run


def told(run_folder: Path) -> list[tuple]:
    return [(turn.kind, turn.step, [(change.key, change.old, change.new) for change in turn.changes])
            for turn in run_of(run_folder).lineage]


def test_a_changed_learning_rate_is_refused_then_allowed_and_told_once(copied, tmp_path):
    """Over two restarts of the same command, the second from a checkpoint that knows of the change.

    Mutations of the lineage are caught, and named, by tests/unit/test_train_origin.py.
    """
    refused = train(copied, RATE, "train.micro_batch_size=4", code=EXIT_USER)
    check_message(refused.stderr, [
        "changes the math: optimizer.learning_rate = 0.003 then, 0.001 now",
        "add: --allow-change optimizer.learning_rate",
    ])
    turns = [("changed", 6, [("optimizer.learning_rate", 0.003, 0.001)])]
    first = train(copied, RATE, *ALLOW_RATE, "train.max_steps=9", "optimizer.horizon_steps=12")
    assert "changes the math: optimizer.learning_rate = 0.003 then, 0.001 now, allowed" in first.stdout
    assert "safe: train.max_steps = 12 then, 9 now" in first.stdout
    assert told(tmp_path / "run") == turns
    again = train(copied, RATE, *ALLOW_RATE, "optimizer.horizon_steps=12")
    assert "changes the math" not in again.stdout
    assert "at step 9" in again.stdout
    assert told(tmp_path / "run") == turns
    assert curve(tmp_path / "run")[-1][1] == 12
    assert megascale("report", tmp_path / "run").returncode == EXIT_OK
    report = (tmp_path / "run/report.html").read_text()
    assert "resumed at step 6; changed at step 6: optimizer.learning_rate = 0.003 then, 0.001 now" in report


def test_a_fork_without_changes_goes_on_as_its_source_did(copied, clean, tmp_path):
    """To the bit, with an id and a W&B run of its own; the same command then goes on with the fork itself.

    Mutation of what a restart begins with: tests/unit/test_train_origin.py.
    """
    before = {path: path.read_bytes() for path in clean.rglob("*") if path.is_file()}
    fork = tmp_path / "fork"
    command = (copied, f"run.folder={fork}", "--fork", f"{clean}@6")
    first = train(*command, "train.max_steps=9", "optimizer.horizon_steps=12")
    assert f"a new run, forked from {clean}/checkpoints/step_00000006 at step 6" in first.stdout
    second = train(*command)
    assert f"resuming from {fork}/checkpoints/step_00000009 at step 9" in second.stdout
    assert "obeyed when this run began" in second.stdout
    whole = [point for point in curve(clean) if point[1] > 6]
    # The first session ended at step 9, and evaluated all rows there; what was trained is the same.
    assert [point for point in curve(fork) if point[:2] != ("eval", 9)] == whole
    assert {path: path.read_bytes() for path in clean.rglob("*") if path.is_file()} == before
    source, own = (peek_checkpoint(LocalStore(folder)).index for folder in (clean, fork))
    assert own.state.stream_digest == source.state.stream_digest
    assert own.state.wandb_run_id != source.state.wandb_run_id
    assert own.run.run_id == json.loads((fork / "run.json").read_text())["run_id"] != source.run.run_id
    assert {key: record.digest for key, record in own.tensors.items()} == {
        key: record.digest for key, record in source.tensors.items()
    }
    turn, = own.run.lineage
    assert (turn.kind, turn.step, turn.source, turn.run_id, turn.changes) == (
        "fork", 6, str(clean.resolve()), source.run.run_id, ()
    )


@pytest.mark.slow
def test_a_fork_at_an_older_step_with_a_changed_learning_rate(copied, clean, tmp_path):
    fork = tmp_path / "fork"
    command = (copied, f"run.folder={fork}", RATE, "--fork", f"{clean}@6")
    check_message(train(*command, code=EXIT_USER).stderr, ["add: --allow-change optimizer.learning_rate"])
    train(*command, *ALLOW_RATE)
    assert told(fork) == [("fork", 6, [("optimizer.learning_rate", 0.003, 0.001)])]
    assert [point[1] for point in curve(fork) if point[0] == "train"] == [7, 8, 9, 10, 11, 12]
    assert curve(fork)[0][2] == next(point[2] for point in curve(clean) if point[1] == 7)  # before the first update
    assert curve(fork)[1][2] != next(point[2] for point in curve(clean) if point[1] == 8)


def test_forks_that_cannot_be(copied, clean, tmp_path):
    """A run is never set aside for one that can't begin."""
    run_folder = tmp_path / "run"
    for fork, parts in {
        f"{clean}@7": ["no whole checkpoint of step 7; there are those of steps 6, 9, 12"],
        f"{run_folder}@6": ["is this run's own folder"],
    }.items():
        check_message(train(copied, "--fork", fork, "--fresh", code=EXIT_USER).stderr, parts)
    check_message(train(copied, "--fork", f"{clean}@6", code=EXIT_USER).stderr, ["didn't begin with --fork"])
    check_message(train(copied, "--allow-change", "optimizer.lr", code=EXIT_USER).stderr, ["there is no such key"])
    assert not (run_folder / "set_aside").exists()


@pytest.mark.slow
def test_a_run_goes_on_in_another_precision(copied, tmp_path):
    """fp32 to fp16, which begins with the loss scale of its config, and on to bf16, which has none.

    Mutation of `restore_scaler` caught by tests/unit/test_engine_precision.py.
    """
    allowed = ("--allow-change", "precision.dtype", "optimizer.horizon_steps=12")
    train(copied, *allowed, "precision.dtype=fp16", "train.max_steps=8")
    scales = [line["loss_scale"] for line in read_metrics(tmp_path / "run") if line["kind"] == "train"]
    assert scales[-1] > 1.0
    train(copied, *allowed, "precision.dtype=bf16", "train.max_steps=10")
    assert [change[2] for turn in told(tmp_path / "run") for change in turn[2]] == ["fp16", "bf16"]
