"""Ranks on this machine: starts them, passes stop signals on, takes all down when one dies, names the first fault."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from megascale.errors import (
    EXIT_OK,
    EXIT_PEER_LOST,
    EXIT_STOPPED,
    LaunchError,
    RankFailedError,
    StopRequested,
)
from megascale.train.signals import STOP_SIGNALS, stop_when_parent_dies

RANK_MODULE = "megascale.train.rank"
CPU_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 26),
}
"""Ranks without a GPU: torch and DeepSpeed agree that there is none, and glibc keeps the memory of large temporaries
instead of giving it back and faulting it in anew for each of them (14 to 26 % of a step on small fp32 models)."""
POLL_S = 0.05
SAME_SIGNAL_S = 1.0
GRACE_S = 3.0
"""After one rank failed, the others have this long to report a fault of their own before they are killed."""
TAIL_LINES = 25
MAX_RANKS_PER_CORE = 16


@dataclass
class Rank:
    """A rank's process and the file that its messages go to."""

    number: int
    process: subprocess.Popen
    messages: Path

    @property
    def code(self) -> int | None:
        """The exit code, None while the rank runs."""
        return self.process.poll()

    @property
    def text(self) -> str:
        """All that it has said."""
        return self.messages.read_text(encoding="utf-8", errors="replace")

    @property
    def error(self) -> str | None:
        """The message for the user that it ended with, None when it had none."""
        _, marker, message = ("\n" + self.text).rpartition("\nerror: ")
        return message.strip() if marker else None


class StopSignals:
    """Counts the stop signals that this process gets while the `with` block runs.

    Signals within a second are one: `timeout` and some schedulers signal the process and its group at once.
    """

    def __init__(self) -> None:
        self.count = 0
        self._last_s = float("-inf")

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        now_s = time.monotonic()
        if now_s - self._last_s > SAME_SIGNAL_S:
            self.count += 1
            self._last_s = now_s


class LocalRanks:
    """The ranks of one attempt. A first stop signal asks them to save and stop, a second one kills them."""

    def __init__(self, signals: StopSignals):
        self.ranks: list[Rank] = []
        self._signals, self._num_obeyed = signals, 0

    def start(self, arguments: Sequence[str], num_ranks: int, folder: Path, module: str) -> None:
        """Starts the ranks, with a file each in `folder` for their messages."""
        port = _free_port()
        command = [sys.executable, "-m", module, *arguments]
        for rank in range(num_ranks):
            self.ranks.append(self._start(command, rank, num_ranks, port, folder / f"rank_{rank:05d}.log"))

    def watch(self) -> None:
        """Waits until all ranks have ended, or for a moment after the first failure.

        Raises:
            StopRequested: they were asked to stop, and saved.
            RankFailedError: a rank failed.
        """
        failed: list[Rank] = []
        deadline = float("inf")
        while any(rank.code is None for rank in self.ranks) and time.monotonic() < deadline:
            time.sleep(POLL_S)
            self._obey_signals()
            failed += self._new_failures(failed)
            if failed and deadline == float("inf"):
                deadline = time.monotonic() + GRACE_S
        failed += self._new_failures(failed)
        if failed:
            self._raise_fault(first_cause(failed))
        stopped = [rank for rank in self.ranks if rank.code == EXIT_STOPPED]
        if stopped:
            raise StopRequested(stopped[0].text.strip().splitlines()[-1])

    def kill(self) -> None:
        """Ends the ranks that still run."""
        for rank in self.ranks:
            rank.process.kill()
        for rank in self.ranks:
            rank.process.wait()

    def _start(self, command: Sequence[str], rank: int, num_ranks: int, port: int, messages: Path) -> Rank:
        with messages.open("wb") as file:
            process = subprocess.Popen(
                command,
                env=os.environ | rank_environment(rank, rank, num_ranks, "127.0.0.1", port, _threads(num_ranks)),
                stdin=subprocess.DEVNULL,
                stdout=None if rank == 0 else file,
                stderr=file,
                start_new_session=True,  # Ctrl-C in a terminal reaches the launcher alone, which passes it on once
                preexec_fn=stop_when_parent_dies,  # not only in the rank itself, whose imports take seconds
            )
        return Rank(rank, process, messages)

    def _new_failures(self, known: Sequence[Rank]) -> list[Rank]:
        return [rank for rank in self.ranks if rank.code not in (None, EXIT_OK, EXIT_STOPPED) and rank not in known]

    def _obey_signals(self) -> None:
        """Passes a stop request on; here and not in the handler, which may interrupt a print or a poll."""
        if self._signals.count == self._num_obeyed:
            return
        self._num_obeyed = self._signals.count
        for rank in self.ranks:
            rank.process.send_signal(signal.SIGTERM if self._num_obeyed == 1 else signal.SIGKILL)
        if self._num_obeyed == 1:
            print("stopping: saving first (once more to stop at once, without saving)", file=sys.stderr, flush=True)

    def _raise_fault(self, rank: Rank) -> None:
        code = rank.code
        if self._signals.count > 1 and code == -signal.SIGKILL:
            raise RankFailedError(
                "stopped at once and without saving, as asked; the same command resumes from the last checkpoint"
            )
        if self._signals.count and code == -signal.SIGTERM:  # before the rank could set up its own handling
            raise StopRequested("stopped while starting, as asked; the same command starts or resumes the run")
        if rank.error is not None:
            fault = RankFailedError(rank.error)
            fault.exit_code = code
            raise fault
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
        tail = "\n".join(rank.text.splitlines()[-TAIL_LINES:])
        raise RankFailedError(
            f"rank {rank.number} {how}; all ranks were stopped. The same command resumes from the last checkpoint"
            + (f"\nthe end of its messages:\n{tail}" if tail else "")
        )


def run_local(arguments: Sequence[str], num_ranks: int, module: str = RANK_MODULE) -> None:
    """Runs a module with these arguments on `num_ranks` ranks of this machine, to their end.

    Raises:
        StopRequested: they were asked to stop, and saved.
        RankFailedError: a rank failed; the others are gone too.
    """
    with tempfile.TemporaryDirectory(prefix="megascale-") as folder, StopSignals() as signals:
        ranks = LocalRanks(signals)
        try:
            ranks.start(arguments, num_ranks, Path(folder), module)
            ranks.watch()
        finally:
            ranks.kill()


def first_cause(failed: Sequence[Rank]) -> Rank:
    """Of ranks in the order of their end, the one that knows why.

    The first to fail for a reason of its own. When several ended alike, with a message for the user, they have agreed
    to, and the lowest rank, which acts for the others, has the details.
    """
    first = next((rank for rank in failed if rank.code != EXIT_PEER_LOST), failed[0])
    if first.error is None:
        return first
    return min((r for r in failed if r.code == first.code and r.error is not None), key=lambda rank: rank.number)


def rank_environment(
    rank: int, local_rank: int, world_size: int, address: str, port: int, num_threads: int
) -> dict[str, str]:
    """The variables that a rank reads, the same that torchrun sets."""
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(num_threads)),
        "PYTHONUNBUFFERED": "1",
    }
    return environment if count_gpus() else environment | CPU_ENVIRONMENT


def count_gpus() -> int:
    """GPUs that a CUDA program would see, counted without CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def count_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_num_ranks(num_ranks: int) -> None:
    """Refuses a number of ranks that this machine has no place for.

    Raises:
        LaunchError: fewer than one, more than the GPUs, or far more than the cores.
    """
    gpus, cores = count_gpus(), count_cores()
    limit, what = (gpus, f"{gpus} GPUs") if gpus else (cores * MAX_RANKS_PER_CORE, f"{cores} cores")
    if not 1 <= num_ranks <= limit:
        raise LaunchError(f"--nproc {num_ranks}: this machine has {what}; use 1 to {limit}")


def given_ranks(environment: dict[str, str]) -> dict[str, str] | None:
    """The rank variables to use when torchrun or srun started this process as one of several, else None."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return {}
    if int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_ID" in environment:
        job, first_host = int(environment["SLURM_JOB_ID"]), _first_host(environment)
        return rank_environment(
            int(environment["SLURM_PROCID"]),
            # A task that sees one GPU has been given its own, and to it that is number 0.
            0 if count_gpus() == 1 else int(environment["SLURM_LOCALID"]),
            int(environment["SLURM_NTASKS"]),
            first_host,
            20000 + job % 20000,
            int(environment.get("SLURM_CPUS_PER_TASK", "1")),
        )
    return None


def _first_host(environment: dict[str, str]) -> str:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_NODELIST"]
    shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return shown.stdout.split()[0]


def _threads(num_ranks: int) -> int:
    return max(1, count_cores() // num_ranks)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
