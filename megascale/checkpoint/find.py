"""Finding the newest whole checkpoint of a run.

Nothing of a checkpoint is used before all of it was verified: the index against itself and its hash, each file against
its size and SHA-256. The ranks share out the files and agree on the verdict.
"""

import errno
from dataclasses import dataclass
from pathlib import Path

from megascale.checkpoint.comm import Comm, LocalComm, ask_rank_zero, run_on_rank_zero, run_together
from megascale.checkpoint.files import FileRecord
from megascale.checkpoint.index import (
    INDEX_NAME,
    MAX_JSON_BYTES,
    SUMS_NAME,
    CheckpointIndex,
    OtherVersionError,
    parse_index,
)
from megascale.checkpoint.store import Store
from megascale.errors import CheckpointError

NO_STEP = -1
REASONS_SHOWN = 5


@dataclass(frozen=True)
class VerifiedCheckpoint:
    """A checkpoint whose every byte was found as it was written.

    Attributes:
        store: where it lies.
        index: everything about it but the tensors.
        rejected: one message for each newer checkpoint that was found damaged and moved to the quarantine.
    """

    store: Store
    index: CheckpointIndex
    rejected: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """Completed steps in it."""
        return self.index.state.step

    @property
    def path(self) -> Path | str:
        """Its place, for messages."""
        return self.store.path(self.step)


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that isn't what was written, or isn't this run's: an older one may serve instead."""


def find_checkpoint(store: Store, *, run_id: str | None, comm: Comm) -> VerifiedCheckpoint | None:
    """Finds the newest whole checkpoint of this run; damaged ones are moved to quarantine with the reason.

    Every rank calls it. Only the job that owns the run folder may: leftovers of killed saves are removed.

    Args:
        run_id: checkpoints of other runs are quarantined too; None takes any run's.

    Returns:
        None only where there never was a checkpoint: the run starts at step 0.

    Raises:
        CheckpointError: there are or were checkpoints, but none is whole; or they can't be read or moved.
    """
    run_on_rank_zero(comm, lambda: store.prepare(""))
    rejected: list[str] = []
    while (step := ask_rank_zero(comm, lambda: max(store.steps(), default=NO_STEP))) != NO_STEP:
        try:
            found = verify_checkpoint(store, step, run_id=run_id, comm=comm)
            return VerifiedCheckpoint(store, found.index, tuple(rejected))
        except DamagedCheckpointError as damage:
            rejected.append(str(damage))
        run_on_rank_zero(comm, lambda step=step: store.quarantine(step, rejected[-1]))
    if ask_rank_zero(comm, store.has_quarantine):
        raise CheckpointError(
            f"{store.place}: no whole checkpoint is left to resume from; the damaged ones are in its quarantine, each"
            " with the reason"
            + "".join(f"\n  {reason}" for reason in rejected[:REASONS_SHOWN])
            + "\nRestore one of them from a backup, or start again from step 0 with --fresh"
        )
    return None


def peek_checkpoint(store: Store, step: int | None = None) -> VerifiedCheckpoint:
    """The newest whole checkpoint, or that of one step, for a reader beside the run: nothing is moved or removed.

    Raises:
        CheckpointError: there is none; the message says what was wrong with those that are there.
    """
    steps = store.steps()
    reasons = []
    for candidate in reversed(steps) if step is None else [step]:
        try:
            return verify_checkpoint(store, candidate)
        except DamagedCheckpointError as damage:
            reasons.append(str(damage))
    asked = "whole checkpoint" if step is None else f"whole checkpoint of step {step}"
    present = f"steps {', '.join(map(str, steps))} are there" if steps else "there is none at all"
    raise CheckpointError(f"{store.place}: no {asked}; {present}" + "".join(f"\n  {reason}" for reason in reasons))


def verify_checkpoint(
    store: Store, step: int, *, run_id: str | None = None, comm: Comm | None = None
) -> VerifiedCheckpoint:
    """Reads every byte of a checkpoint once, shared out over the ranks, and compares it with what was written.

    Raises:
        DamagedCheckpointError: on every rank alike: what is missing, changed, or another run's.
        CheckpointError: a file can't be read although it may be whole, for instance for lack of permission.

    Cost: SHA-256 of 1 / world_size of the checkpoint on each rank, 0.5 to 2 GB/s a core.
    """
    comm = comm or LocalComm()
    index, damage = run_together(comm, lambda: _check_index(store, step, run_id))
    if any(comm.control_gather(int(index is None))):
        place = f"{store.path(step)}/{INDEX_NAME}"
        raise DamagedCheckpointError(damage or f"{place}: another rank can't read it or finds it changed")
    names = sorted(index.files)
    share = range(comm.rank, len(names), comm.world_size)
    bad = run_together(
        comm, lambda: [i for i in share if not _is_whole(store, step, names[i], index.files[names[i]])]
    )
    first_bad = min(comm.control_gather(bad[0] if bad else len(names)))
    if first_bad < len(names):
        name = names[first_bad]  # described by all before any of them moves the checkpoint away
        raise DamagedCheckpointError(
            run_together(comm, lambda: _describe_damage(store, step, name, index.files[name]))
        )
    return VerifiedCheckpoint(store, index)


def read_stored_index(store: Store, step: int) -> CheckpointIndex:
    """Reads the index of a checkpoint; raises as `parse_index` does, and OSError."""
    texts = [store.read_small(step, name, MAX_JSON_BYTES) for name in (INDEX_NAME, SUMS_NAME)]
    return parse_index(*texts, str(store.path(step)))


def _check_index(store: Store, step: int, run_id: str | None) -> tuple[CheckpointIndex | None, str | None]:
    path = str(store.path(step))
    try:
        index = read_stored_index(store, step)
    except OtherVersionError:
        raise
    except CheckpointError as error:
        return None, str(error)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return None, str(error)
    if index.state.step != step:
        return None, f"{path}: is the checkpoint of step {index.state.step} under another name"
    if run_id not in (None, index.run.run_id):
        return None, f"{path}: belongs to run {index.run.run_id}, not to this run {run_id}"
    return index, None


def _is_whole(store: Store, step: int, name: str, record: FileRecord) -> bool:
    try:
        return store.is_whole(step, name, record)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return False


def _describe_damage(store: Store, step: int, name: str, record: FileRecord) -> str:
    size_bytes = store.size_bytes(step, name)
    found = "no such file" if size_bytes is None else f"{size_bytes} bytes"
    if size_bytes == record.bytes:
        found = "as many bytes, but changed or unreadable ones"
    return (
        f"{store.path(step)}/{name}: damaged: the index lists {record.bytes} bytes with SHA-256"
        f" {record.sha256[:12]}..., found {found}"
    )
