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

from megascale.errors import EXIT_OK, EXIT_PEER_LOST, EXIT_STOPPED, LaunchError, RankFailedError, StopRequested

RANK_MODULE = "megascale.train.rank"
CPU_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 26),
}
"""Ranks without a GPU: DeepSpeed needn't look for one, and glibc keeps the memory of large temporaries instead of
giving it back and faulting it in anew for each of them (14 to 26 % of a step's time on small fp32 models)."""
POLL_S = 0.05
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


class LocalRanks:
    """The ranks of one attempt. A first stop signal asks them to save and stop, a second one kills them."""

    def __init__(self, arguments: Sequence[str], num_ranks: int, folder: Path, module: str = RANK_MODULE):
        port = _free_port()
        self.num_stop_signals = 0
        command = [sys.executable, "-m", module, *arguments]
        self.ranks = [self._start(command, rank, num_ranks, port, folder) for rank in range(num_ranks)]

    def wait(self) -> None:
        """Waits until all ranks have ended.

        Raises:
            StopRequested: they were asked to stop, and saved.
            RankFailedError: one failed; the others are gone too.
        """
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            first_failed = self._watch()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self._kill_all()
        if first_failed is not None:
            self._raise_fault(first_failed)

    def _start(self, command: Sequence[str], rank: int, num_ranks: int, port: int, folder: Path) -> Rank:
        messages = folder / f"rank_{rank:05d}.log"
        with messages.open("wb") as file:
            process = subprocess.Popen(
                command,
                env=os.environ | rank_environment(rank, rank, num_ranks, "127.0.0.1", port, _threads(num_ranks)),
                stdin=subprocess.DEVNULL,
                stdout=None if rank == 0 else file,
                stderr=file,
                start_new_session=True,  # Ctrl-C in a terminal reaches the launcher alone, which passes it on once
            )
        return Rank(rank, process, messages)

    def _watch(self) -> Rank | None:
        """Returns the first rank that failed for a reason of its own, None when none did."""
        failed: list[Rank] = []
        deadline = float("inf")
        while any(rank.process.poll() is None for rank in self.ranks) and time.monotonic() < deadline:
            time.sleep(POLL_S)
            failed += [r for r in self.ranks if r.process.poll() not in (None, EXIT_OK) and r not in failed]
            if failed and deadline == float("inf"):
                deadline = time.monotonic() + GRACE_S
        failed += [r for r in self.ranks if r.process.poll() not in (None, EXIT_OK) and r not in failed]
        own_faults = [rank for rank in failed if rank.process.returncode != EXIT_PEER_LOST]
        return next(iter(own_faults or failed), None)

    def _on_signal(self, number: int, frame: object) -> None:
        self.num_stop_signals += 1
        if self.num_stop_signals > 1:
            self._kill_all()
            return
        print("stopping: saving first (once more to stop at once, without saving)", file=sys.stderr, flush=True)
        for rank in self.ranks:
            if rank.process.poll() is None:
                rank.process.send_signal(signal.SIGTERM)

    def _kill_all(self) -> None:
        for rank in self.ranks:
            if rank.process.poll() is None:
                rank.process.kill()
        for rank in self.ranks:
            rank.process.wait()

    def _raise_fault(self, rank: Rank) -> None:
        code, text = rank.process.returncode, rank.messages.read_text(encoding="utf-8", errors="replace")
        if code == EXIT_STOPPED:
            raise StopRequested(text.strip().splitlines()[-1])
        _, marker, message = ("\n" + text).rpartition("\nerror: ")
        if marker:
            fault = RankFailedError(message.strip())
            fault.exit_code = code
            raise fault
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
        tail = "\n".join(text.splitlines()[-TAIL_LINES:])
        raise RankFailedError(
            f"rank {rank.number} {how}; all ranks were stopped. The same command resumes from the last checkpoint"
            + (f"\nthe end of its messages:\n{tail}" if tail else "")
        )


def run_local(arguments: Sequence[str], num_ranks: int, module: str = RANK_MODULE) -> None:
    """Runs a module with these arguments on `num_ranks` ranks of this machine, to their end."""
    with tempfile.TemporaryDirectory(prefix="megascale-") as folder:
        LocalRanks(arguments, num_ranks, Path(folder), module).wait()


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
            int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"]), int(environment["SLURM_NTASKS"]),
            first_host, 20000 + job % 20000, 1,
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
