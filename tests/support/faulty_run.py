"""Runs whose ranks do something at a chosen place, started through the real command line; and how runs ended."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.ranks import REPOSITORY
from tests.support.tiny_run import command_environment, curve

NUM_STEPS = 12
"""Steps of the tiny run."""
LONGEST_S = 90.0


class FaultyRun:
    """`megascale train CONFIG ...` on two ranks of a test program, with a plan for them.

    Args:
        program: module name of the ranks' program, in `tests.e2e.programs`.
        folder: for the plan, and for whatever the ranks leave.
    """

    def __init__(self, program: str, folder: Path, plan: dict, *arguments: str):
        self.folder = folder
        folder.mkdir()
        (folder / "plan.json").write_text(json.dumps(plan | {"folder": str(folder)}))
        environment = command_environment(
            MEGASCALE_TEST_RANKS=f"tests.e2e.programs.{program}", MEGASCALE_TEST_PLAN=str(folder / "plan.json")
        )
        self._output = (folder / "output").open("w")  # no pipe, which a rank that outlives its launcher would meet
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.programs.command", "train", *map(str, arguments), "--nproc", "2"],
            env=environment, cwd=REPOSITORY, stdout=self._output, stderr=subprocess.STDOUT,
        )

    def wait_for_pause(self) -> list[int]:
        """Waits until both ranks pause; returns their process ids."""
        wait_until(self._is_paused, self.text)
        return child_pids(self.process.pid)

    def _is_paused(self) -> bool:
        assert self.process.poll() is None, f"ended before its pause: {self.text()}"
        return all((self.folder / f"paused_{rank}").exists() for rank in (0, 1))

    def go_on(self) -> None:
        """Ends the pause."""
        (self.folder / "go").touch()

    def end(self) -> int:
        """Waits for the command's end and returns its exit code."""
        try:
            return self.process.wait(LONGEST_S)
        finally:
            self.close()

    def text(self) -> str:
        """What launcher and ranks have printed so far."""
        return (self.folder / "output").read_text()

    def close(self) -> None:
        """Leaves nothing running, whatever the test did."""
        if self.process.poll() is None:
            for pid in [*child_pids(self.process.pid), self.process.pid]:
                send_signal(pid, signal.SIGKILL)
            self.process.wait()
        self._output.close()


@contextmanager
def faulty_run(program: str, folder: Path, plan: dict, *arguments: str) -> Iterator[FaultyRun]:
    """A faulty run, ended with the block."""
    run = FaultyRun(program, folder, plan, *arguments)
    try:
        yield run
    finally:
        run.close()


def child_pids(pid: int) -> list[int]:
    """The processes that a process has started and that still run."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet doesn't."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def send_signal(pid: int, number: int) -> None:
    """Sends a signal to a process that may be gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def wait_until(condition, describe=lambda: "", timeout_s: float = LONGEST_S) -> None:
    """Waits for a condition; fails with a description when it doesn't come true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain: {describe()}"
        time.sleep(0.02)


def checkpoint_names(run_folder: Path) -> list[str]:
    """Names in the checkpoint folder."""
    return sorted(path.name for path in (run_folder / "checkpoints").iterdir())


def assert_same_end(run_folder: Path, clean: Path) -> None:
    """Metrics, weights, moments and state are those of the other run, to the bit."""
    assert curve(run_folder) == curve(clean)
    name = f"checkpoints/step_{NUM_STEPS:08d}"
    for path in sorted((clean / name).glob("*.safetensors")):
        assert (run_folder / name / path.name).read_bytes() == path.read_bytes(), path.name
    states = [json.loads((folder / name / "index.json").read_text())["state"] for folder in (run_folder, clean)]
    assert states[0] | {"wandb_run_id": None} == states[1] | {"wandb_run_id": None}
