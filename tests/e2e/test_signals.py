"""Stop signals and files at every stage of a run: it saves, exits with code 75, and ends as if never stopped."""

import signal
import subprocess
import sys
import time

import pytest

from launcher.local import SAME_SIGNAL_S
from megascale.errors import EXIT_RUN, EXIT_STOPPED
from megascale.train.signals import LOOK_INTERVAL_S, SAVE_FILE, STOP_FILE
from tests.support.faulty_run import (
    NUM_STEPS,
    assert_same_end,
    checkpoint_names,
    faulty_run,
    is_alive,
    send_signal,
    wait_until,
)
from tests.support.ranks import REPOSITORY
from tests.support.tiny_run import command_environment, curve, megascale, write_config

STARTING = "stopped while starting, as asked; the same command starts or resumes the run"
STOPS = [
    ("import", 0, signal.SIGTERM, False, None),
    ("setup", 0, signal.SIGINT, False, 0),
    ("forward", 1, signal.SIGINT, False, 2),
    ("evaluate", 4, signal.SIGTERM, False, 4),
    ("save", 6, signal.SIGTERM, False, 6),
    ("forward", 7, signal.SIGTERM, True, 8),
    ("import", 0, signal.SIGTERM, True, None),
]
"""(phase, step, signal, whether it goes to all processes as SLURM sends it, step at which the run stops)."""


@pytest.fixture
def config(corpus, tmp_path):
    return write_config(tmp_path, corpus)


def check_stop(config, folder, phase, step, number, to_all, stopped_step) -> None:
    with faulty_run("paused_rank", folder, {"phase": phase, "step": step}, config) as run:
        ranks = run.wait_for_pause()
        assert len(ranks) == 2
        for pid in [*(ranks if to_all else []), run.process.pid]:
            send_signal(pid, number)
        wait_until(lambda: "stopping" in run.text(), run.text)  # the launcher has passed it on
        if phase != "import":
            run.go_on()
        assert run.end() == EXIT_STOPPED, run.text()
        message = f"stopped at step {stopped_step} of {NUM_STEPS}, as asked; the same command resumes"
        assert run.text().splitlines()[-1] == (STARTING if stopped_step is None else message)
        assert "Traceback" not in run.text()
        assert not any(is_alive(pid) for pid in ranks)
    if stopped_step is not None:
        assert checkpoint_names(config.parent / "run")[-1] == f"step_{stopped_step:08d}"


def test_stopped_again_and_again_ends_as_if_never_stopped(config, clean, tmp_path):
    """The run is stopped at each place of STOPS in turn, resumed each time, and compared with the undisturbed one.

    Mutations seen to be caught: no save at a stop; an evaluation cut short counts as done; a rank that a
    signal ends before it can handle it counts as failed; exit code 75 of a rank counts as failed.
    """
    for number, stop in enumerate(STOPS):
        check_stop(config, tmp_path / f"stop_{number}", *stop)
    done = megascale("train", config, "--nproc", "2")
    assert done.returncode == 0, done.stderr
    assert_same_end(tmp_path / "run", clean)


def test_a_killed_launcher_leaves_no_rank_and_loses_no_step(config, clean, tmp_path):
    """Ranks notice that their launcher is gone, save and end; also those that were still starting.

    Mutation seen to be caught: the parent-death signal set by the rank's own program only, seconds after its start.
    """
    for phase, step, saved in (("import", 0, None), ("forward", 4, "step_00000005")):
        with faulty_run("paused_rank", tmp_path / phase, {"phase": phase, "step": step}, config) as run:
            ranks = run.wait_for_pause()
            run.process.kill()
            run.process.wait()
            run.go_on()
            wait_until(lambda ranks=ranks: not any(is_alive(pid) for pid in ranks), run.text, 30)
        if saved:
            assert saved in checkpoint_names(tmp_path / "run")
        else:
            assert not (tmp_path / "run").exists()
    done = megascale("train", config, "--nproc", "2")
    assert "at step 5" in done.stdout
    assert_same_end(tmp_path / "run", clean)


def test_a_second_signal_ends_the_run_at_once(config, tmp_path):
    """Two signals at one moment are one request, as `timeout` and some schedulers send them; a later one kills.

    Mutations seen to be caught: each signal counts; a second one is passed on like the first.
    """
    options = config, "checkpoint.asynchronous=false"  # the save of step 3 is to be over by then
    with faulty_run("paused_rank", tmp_path / "twice", {"phase": "forward", "step": 4}, *options) as run:
        ranks = run.wait_for_pause()
        run.process.send_signal(signal.SIGTERM)
        run.process.send_signal(signal.SIGINT)
        time.sleep(SAME_SIGNAL_S + 0.2)
        assert all(is_alive(pid) for pid in ranks), "a double signal isn't a second request"
        run.process.send_signal(signal.SIGINT)
        assert run.process.wait(5) == EXIT_RUN
        assert "stopped at once and without saving, as asked; the same command resumes" in run.text()
        assert not any(is_alive(pid) for pid in ranks)
    assert checkpoint_names(tmp_path / "run") == ["step_00000003"]


def test_a_stop_file_stops_the_run_until_it_is_removed(config, clean, tmp_path):
    """Noticed within an evaluation; a run that is started again beside the file stops at once and says why.

    Mutation seen to be caught: no look in an evaluation.
    """
    stop_file = tmp_path / "run" / STOP_FILE
    with faulty_run("paused_rank", tmp_path / "stop", {"phase": "evaluate", "step": 4}, config) as run:
        run.wait_for_pause()
        stop_file.touch()
        time.sleep(LOOK_INTERVAL_S)
        run.go_on()
        assert run.end() == EXIT_STOPPED, run.text()
        message = f"stopped at step 4 of {NUM_STEPS}, as asked by {stop_file}; remove it, and the same command resumes"
        assert run.text().splitlines()[-1] == message
    assert ("eval", 4) not in [line[:2] for line in curve(tmp_path / "run")]
    again = megascale("train", config, "--nproc", "2")
    assert again.returncode == EXIT_STOPPED
    assert message in again.stderr
    stop_file.unlink()
    done = megascale("train", config, "--nproc", "2")
    assert done.returncode == 0, done.stderr
    assert_same_end(tmp_path / "run", clean)


def test_a_save_file_saves_once_and_the_run_goes_on(config, clean, tmp_path):
    """Mutations seen to be caught: the file not removed; no save."""
    options = config, "checkpoint.keep_last=99"
    with faulty_run("paused_rank", tmp_path / "save", {"phase": "forward", "step": 4}, *options) as run:
        run.wait_for_pause()
        (tmp_path / "run" / SAVE_FILE).touch()
        time.sleep(LOOK_INTERVAL_S)
        run.go_on()
        assert run.end() == 0, run.text()
    assert not (tmp_path / "run" / SAVE_FILE).exists()
    assert checkpoint_names(tmp_path / "run") == [f"step_{step:08d}" for step in (3, 5, 6, 9, 12)]
    assert curve(tmp_path / "run") == curve(clean)


@pytest.mark.parametrize("by_file", [False, True])
def test_a_stop_is_noticed_while_data_does_not_come(config, clean, tmp_path, by_file):
    """One rank waits for data for ever, the other one for it: asked to stop, both save and end within seconds.

    By file, too, which the rank that waits has to see for itself.

    Mutations seen to be caught: a wait without an end for data; only rank 0 looks for the file; `close` waits for the
    thread that hangs.
    """
    with faulty_run("stalled_rank", tmp_path / "stall", {"rank": 1, "step": 5}, config) as run:
        run.wait_for_pause()
        if by_file:
            (tmp_path / "run" / STOP_FILE).touch()
        else:
            run.process.send_signal(signal.SIGTERM)
        assert run.process.wait(30) == EXIT_STOPPED, run.text()
        assert f"stopped at step 5 of {NUM_STEPS}, as asked" in run.text()
    assert checkpoint_names(tmp_path / "run")[-1] == "step_00000005"
    if by_file:
        (tmp_path / "run" / STOP_FILE).unlink()
        done = megascale("train", config, "--nproc", "2")
        assert done.returncode == 0, done.stderr
        assert_same_end(tmp_path / "run", clean)


def test_torchrun_gives_the_same_run(config, clean, tmp_path):
    """`torchrun -m launcher train` uses the ranks that it is given, and starts none of its own.

    Mutation seen to be caught: it starts its own all the same.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "launcher", "train", str(config)], env=command_environment(), cwd=REPOSITORY,
        capture_output=True, text=True, timeout=240, check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"step {NUM_STEPS}/{NUM_STEPS}  loss") == 1
    assert_same_end(tmp_path / "run", clean)
