"""A run that is killed and resumed, with W&B offline: its files, read back by wandb itself, show every step once."""

import json
import os
import signal

import pytest

from megascale.observe.run_files import read_json_lines
from tests.support.faulty_run import NUM_STEPS, child_pids, faulty_run, send_signal
from tests.support.tiny_run import megascale, read_metrics, write_config
from tests.unit.test_observe_wandb import FakeWandb, sync


@pytest.fixture
def server():
    fake = FakeWandb()
    yield fake
    fake.close()


@pytest.fixture
def environment(monkeypatch):
    """No account of the user's, for all processes of the test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


@pytest.mark.usefixtures("environment")
def test_every_step_once_across_a_kill_and_a_stop(corpus, tmp_path, server):
    """Killed in step 8 with a checkpoint of step 6, stopped by a signal in step 10, resumed to the end.

    Mutations seen to be caught: steps that W&B has are sent again; each session gets a W&B run of its own.
    """
    offline = [write_config(tmp_path, corpus), "observe.wandb.mode=offline"]
    with faulty_run("paused_rank", tmp_path / "kill", {"phase": "forward", "step": 7}, *offline) as run:
        ranks = run.wait_for_pause()
        for pid in [run.process.pid, *ranks]:
            send_signal(pid, signal.SIGKILL)
    with faulty_run("paused_rank", tmp_path / "stop", {"phase": "forward", "step": 9}, *offline) as run:
        ranks = run.wait_for_pause()
        services = child_pids(ranks[0])
        for pid in [run.process.pid, *ranks, *services]:
            send_signal(pid, signal.SIGTERM)
        run.go_on()
        assert run.end() == 75, run.text()
    done = megascale("train", *offline, "--nproc", "2")
    assert done.returncode == 0, done.stderr
    sync(tmp_path / "run", server)
    (rows,) = server.rows.values()
    assert [row["_step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    losses = {line["step"]: line["loss"] for line in read_metrics(tmp_path / "run") if line["kind"] == "train"}
    assert [row["train/loss"] for row in rows] == list(losses.values())
    timed = {row["_step"]: row for row in rows if "goodput/goodput_fraction" in row}
    assert list(timed) == [3, 6, 9, 10, 12]
    killed_at, resumed_at = 7, [line["resumed_step"] for line in read_json_lines(tmp_path / "run/sessions.jsonl")]
    assert timed[12]["goodput/num_sessions"] == len(resumed_at) == 3
    assert timed[12]["goodput/steps_redone"] == killed_at - resumed_at[1]
    state = json.loads((tmp_path / f"run/checkpoints/step_{NUM_STEPS:08d}/index.json").read_text())["state"]
    assert list(server.rows) == [state["wandb_run_id"]]
