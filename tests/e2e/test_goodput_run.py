"""The account of the time of a run that is killed and resumed, through the real command line."""

import json
import signal
import time

import pytest

from megascale.observe.goodput import derive_goodput, read_sessions
from tests.support.faulty_run import NUM_STEPS, faulty_run, send_signal
from tests.support.tiny_run import megascale, write_config


def test_a_killed_run_accounts_for_all_of_its_time(corpus, tmp_path):
    """Killed hard after step 8 with a checkpoint of step 6: no file says how far it came, its log does.

    Mutation seen to be caught: no line at a save.
    """
    began_s, command = time.time(), (write_config(tmp_path, corpus), "checkpoint.asynchronous=false")
    with faulty_run("paused_rank", tmp_path / "kill", {"phase": "forward", "step": 8}, *command) as run:
        ranks = run.wait_for_pause()
        for pid in [run.process.pid, *ranks]:
            send_signal(pid, signal.SIGKILL)
        run.end()
    time.sleep(1.5)
    done = megascale("train", *command, "--nproc", "2")
    assert done.returncode == 0, done.stderr
    (said,) = [line for line in done.stdout.splitlines() if line.startswith("goodput ")]
    assert said.split(": ")[0].endswith("s")
    whole = json.loads((tmp_path / "run/goodput.json").read_text())
    assert (whole["num_sessions"], whole["steps_kept"], whole["steps_redone"]) == (2, NUM_STEPS, 2)
    parts = [whole[name] for name in whole if name.endswith("_s") and name not in ("wall_s", "unix_s")]
    assert sum(parts) == pytest.approx(whole["wall_s"])
    assert whole["wall_s"] <= time.time() - began_s
    assert whole["down_s"] >= 1.5
    assert min(whole[name] for name in ("compute_s", "lost_s", "data_s", "save_s", "evaluate_s", "startup_s")) > 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "goodput"] == [3, 6, 9, 12]
    assert [line["steps_redone"] for line in lines if line["kind"] == "goodput"] == [0, 0, 2, 2]
    report = megascale("report", tmp_path / "run")
    assert report.returncode == 0, report.stderr
    assert f"{NUM_STEPS} steps count, 2 were lost; sessions: 2" in (tmp_path / "run/report.html").read_text()


def test_a_fresh_start_and_a_fork_begin_accounts_of_their_own(corpus, tmp_path):
    """Else a new run would have the time of an old one in its account."""
    config, short = write_config(tmp_path, corpus), ["train.max_steps=3", "evaluate.interval_steps=100"]
    for more in ([], ["--fresh"], ["--fork", f"{tmp_path / 'run'}@3", f"run.folder={tmp_path / 'fork'}"]):
        done = megascale("train", config, *short, *more)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/set_aside/1/goodput.json").exists()
    for name, kept in (("run", 3), ("fork", 0)):
        goodput = derive_goodput(read_sessions(tmp_path / name))
        assert (goodput.num_sessions, goodput.steps_kept, goodput.steps_redone) == (1, kept, 0)
