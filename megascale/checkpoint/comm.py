"""What a checkpoint needs of the other ranks: one collective over whole numbers, so that all agree on every outcome."""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from megascale.errors import CheckpointError

T = TypeVar("T")

FAILED_WITHOUT_ERRNO = -1


class Comm(Protocol):
    """The ranks that save and load together. `megascale.parallel.mesh.Mesh` is one."""

    rank: int
    world_size: int

    def control_gather(self, value: int) -> list[int]:
        """Returns the value of each rank, in rank order, on every rank."""

    def control_sum(self, values: list[int]) -> list[int]:
        """Adds up int64 values over all ranks, modulo 2^64, on every rank."""


@dataclass(frozen=True)
class LocalComm:
    """A single process, for tools and tests."""

    rank: int = 0
    world_size: int = 1

    def control_gather(self, value: int) -> list[int]:
        return [value]

    def control_sum(self, values: list[int]) -> list[int]:
        return values


def run_together(comm: Comm, action: Callable[[], T]) -> T:
    """Runs one part of a joint job on every rank; where it fails on one rank, it fails on all.

    Raises:
        CheckpointError: the action failed somewhere; the message names the ranks and what the system said.
    """
    result, fault = None, None
    try:
        result = action()
    except Exception as error:
        fault = error
    outcomes = comm.control_gather(_outcome_code(fault))
    if not any(outcomes):
        return result
    if isinstance(fault, CheckpointError):
        raise fault
    if isinstance(fault, OSError):
        raise CheckpointError(str(fault)) from fault
    if fault is not None:
        raise fault
    raise CheckpointError(_describe_failures(outcomes))


def run_on_rank_zero(comm: Comm, action: Callable[[], None]) -> None:
    """Runs an action on rank 0 only, while the others wait for its outcome, which is then theirs too."""
    run_together(comm, action if comm.rank == 0 else lambda: None)


def ask_rank_zero(comm: Comm, question: Callable[[], int]) -> int:
    """Rank 0's answer on every rank: what the others see of a shared folder may lag behind."""
    answer = run_together(comm, question if comm.rank == 0 else lambda: 0)
    return comm.control_gather(int(answer))[0]


def _describe_failures(outcomes: list[int]) -> str:
    """Names the first rank that failed, the system's reason, and how many others did."""
    failed = [rank for rank, outcome in enumerate(outcomes) if outcome]
    code = outcomes[failed[0]]
    reason = os.strerror(code) if code in errno.errorcode else "see its own message"
    others = f" (and {len(failed) - 1} more ranks)" if len(failed) > 1 else ""
    return f"rank {failed[0]}{others} failed: {reason}"


def _outcome_code(fault: Exception | None) -> int:
    """0 for success; the error number of the system where there is one."""
    if fault is None:
        return 0
    return (fault.errno if isinstance(fault, OSError) else None) or FAILED_WITHOUT_ERRNO
