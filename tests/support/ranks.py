"""Starts gloo ranks for distributed tests: one helper, so that a hung test always ends and shows every rank's stack."""

import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.support.warm_rank import start_rank

REPOSITORY = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment(rank: int, world_size: int, port: int, on_gpu: bool) -> dict[str, str]:
    """Environment of one rank, as a launcher sets it."""
    hidden = {} if on_gpu else {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return os.environ | hidden | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PYTHONFAULTHANDLER": "1",
    }


def run_ranks(
    module: str, world_size: int, arguments: list[str], folder: Path, timeout_s: float = 240, on_gpu: bool = False
) -> list[str]:
    """Runs `python -m module ARGUMENTS` on each rank and returns what each printed to standard output.

    A rank that fails, or a time limit passed, ends all of them; the error shows the end of every rank's output, and for
    a hang the Python stacks (SIGABRT makes faulthandler print them).
    """
    port = free_port()
    paths = [[folder / f"rank_{rank}.{kind}" for kind in ("out", "err")] for rank in range(world_size)]
    start = _start_fresh if on_gpu else start_rank
    ranks = [
        start(module, arguments, rank_environment(rank, world_size, port, on_gpu), *paths[rank])
        for rank in range(world_size)
    ]
    try:
        failed = _wait(ranks, timeout_s)
    finally:
        for process in ranks:
            if _exit_code(process) is None:
                process.kill()
    texts = [path.read_text() if path.exists() else "" for both in paths for path in both]
    if failed:
        shown = "\n".join(f"--- rank {i // 2} {('out', 'err')[i % 2]}\n{text[-3000:]}" for i, text in enumerate(texts))
        raise AssertionError(f"{module} {arguments}: {failed}\n{shown}")
    return texts[::2]


def _start_fresh(
    module: str, arguments: list[str], environment: dict[str, str], out: Path, err: Path
) -> subprocess.Popen:
    """A process of its own, since CUDA outlives no fork."""
    with out.open("w") as printed, err.open("w") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments], env=environment, cwd=REPOSITORY, stdout=printed, stderr=errors,
        )


def _exit_code(process: subprocess.Popen | BaseProcess) -> int | None:
    return process.poll() if isinstance(process, subprocess.Popen) else process.exitcode


def _wait(ranks: list[subprocess.Popen | BaseProcess], timeout_s: float) -> str | None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        codes = [_exit_code(process) for process in ranks]
        if any(code not in (None, 0) for code in codes):
            time.sleep(0.5)
            return f"exit codes {[_exit_code(process) for process in ranks]}"
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.02)
    for process in ranks:
        os.kill(process.pid, signal.SIGABRT)
    time.sleep(1)
    return f"no end after {timeout_s} s"
