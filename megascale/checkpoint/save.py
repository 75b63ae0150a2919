"""Saving, all ranks together: afterwards either a whole new checkpoint exists, or the earlier ones alone do.

A save runs beside training. `start` copies the state and hands it to this rank's writer; each step the ranks add up
how many of their writers are done (`report`, `advance`); when all are, rank 0's commits. A failure anywhere is raised
on all ranks at the same step. At most one save is under way.
"""

import os
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
import torch

from megascale.checkpoint.comm import Comm
from megascale.checkpoint.index import ProbeRecord, RunRecord
from megascale.checkpoint.lease import LeaseClaim
from megascale.checkpoint.persist import MIB, SPARE_BYTES_PER_RANK, AbandonTask, CommitTask, WriteTask
from megascale.checkpoint.pieces import PieceRecord, RankPieces, file_bytes
from megascale.checkpoint.retention import Retention
from megascale.checkpoint.state import RunState
from megascale.checkpoint.store import Store
from megascale.checkpoint.writer import (
    FAILED,
    LEASE_LOST,
    NON_FINITE,
    InlineWriter,
    ProcessWriter,
    Writer,
)
from megascale.engine.base import StatePiece
from megascale.errors import LeaseLostError, NonFiniteError, SaveError


class Phase(Enum):
    """Where a save stands, the same on every rank."""

    IDLE = "nothing is being saved"
    WRITING = "ranks are writing"
    COMMITTING = "rank 0 is committing"


@dataclass(frozen=True)
class LivePieces(RankPieces):
    """Pieces in the memory where training changes them."""

    tensors: Sequence[torch.Tensor] = ()

    def copy_to(self, targets: Iterable[np.ndarray]) -> None:
        """Copies each piece into the array at its place, all GPU copies at once."""
        with torch.no_grad():
            for target, tensor in zip(targets, self.tensors, strict=True):
                torch.from_numpy(target).copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in self.tensors):
            torch.cuda.current_stream().synchronize()


class Saver:
    """Saves one run's state, one save at a time.

    Args:
        store: where checkpoints lie; all ranks reach it.
        run: what every checkpoint says about the run.
        comm: the ranks that save together.
        retention: what is kept when a new one is safe.
        writer: carries out this rank's part.
        claim: of the lease on the run folder, on rank 0; checked first and right before the commit.
        read_back: whether each file is read again and compared before it counts.
        saved_step: step of the newest checkpoint that is safe; None before there is one.
    """

    def __init__(
        self, store: Store, run: RunRecord, *, comm: Comm, retention: Retention, writer: Writer,
        claim: LeaseClaim | None = None, read_back: bool = True, saved_step: int | None = None,
    ):
        self._store, self._run, self._comm, self._retention = store, run, comm, retention
        self._writer, self._claim, self._read_back = writer, claim, read_back
        self._token, self._num_saves = f"{comm.control_gather(secrets.randbelow(1 << 62))[0]:016x}", 0
        self._phase, self._outcome = Phase.IDLE, None
        self._state: RunState | None = None
        self._probe: ProbeRecord | None = None
        self._needed_bytes: int | None = None
        self.saved_step: int | None = saved_step

    def start(self, state: RunState, pieces: Iterable[StatePiece], probe: ProbeRecord | None = None) -> None:
        """Begins to save; nothing else may be under way. Returns when the tensors may change. Every rank calls it.

        Cost: one copy of this rank's owned pieces.
        """
        if self._phase is not Phase.IDLE:
            raise AssertionError(f"step {self._state.step} is still being saved")
        live = live_pieces(pieces)
        if self._needed_bytes is None:  # the same for each save of a run
            own_bytes = file_bytes(live.records) + SPARE_BYTES_PER_RANK
            self._needed_bytes = sum(self._comm.control_gather(own_bytes))
        self._num_saves += 1
        self._phase, self._outcome, self._state, self._probe = Phase.WRITING, None, state, probe
        leads = self._comm.rank == 0
        self._writer.submit(WriteTask(
            self._store.place, state.step, self._draft_token, self._comm.rank, self._read_back,
            self._needed_bytes if leads else None, self._claim if leads else None,
        ), live)

    def report(self) -> list[int]:
        """What the other ranks need to know: whether this rank's writer is done, and whether it failed."""
        if self._phase is not Phase.IDLE and self._outcome is None:
            self._outcome = self._writer.outcome(0)
        return [int(self._outcome is not None), int(self._outcome is not None and self._outcome.code != 0)]

    def advance(self, num_done: int, num_failed: int) -> int | None:
        """Moves on, once the ranks' reports are added up. Every rank calls it with the same sums.

        Returns:
            The step of a checkpoint that is now safe, None while there is no news.

        Raises:
            NonFiniteError: a value to be saved is NaN or infinite.
            LeaseLostError: another job has taken the run folder.
            SaveError: the checkpoint couldn't be written on some rank. All ranks raise the same kind together, and the
                earlier checkpoints are untouched.
        """
        awaited = {Phase.IDLE: 0, Phase.WRITING: self._comm.world_size, Phase.COMMITTING: 1}[self._phase]
        if not awaited or num_done < awaited:
            return None
        if num_failed:
            self._fail()
        self._outcome = None
        if self._phase is Phase.COMMITTING:
            self._phase, self.saved_step = Phase.IDLE, self._state.step
            return self.saved_step
        self._phase = Phase.COMMITTING
        if self._comm.rank == 0:
            self._writer.submit(CommitTask(
                self._store.place, self._state.step, self._draft_token, self._comm.world_size, self._run, self._state,
                self._probe, self._retention, self._claim,
            ))
        return None

    def finish(self, deadline_s: float | None = None) -> int | None:
        """Waits until what is under way is safe, and returns its step; None when nothing is. Every rank calls it.

        Args:
            deadline_s: a time of `time.monotonic`, the same on all ranks or nearly, after which the save is given up;
                None waits as long as it takes.

        Raises:
            As `advance`; SaveError also when the deadline has passed.
        """
        step = None
        while self._phase is not Phase.IDLE:
            if self._outcome is None and (self._phase is Phase.WRITING or self._comm.rank == 0):
                rest_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
                self._outcome = self._writer.outcome(rest_s)
            is_late = self._outcome is None and (self._phase is Phase.WRITING or self._comm.rank == 0)
            if any(self._comm.control_gather(int(is_late))):
                self._phase, late = Phase.IDLE, self._phase
                raise SaveError(f"{self._path}: not saved within the time given: {late.value}. {UNTOUCHED}")
            reports = [self._comm.control_gather(flag) for flag in self.report()]
            step = self.advance(*(sum(flags) for flags in reports))
        return step

    def close(self) -> None:
        """Ends the writer; what it was saving is lost."""
        self._writer.close()

    @property
    def _draft_token(self) -> str:
        return f"{self._token}{self._num_saves:06x}"

    @property
    def _path(self) -> Path | str:
        return self._store.path(self._state.step)

    def _fail(self) -> None:
        """Raises what went wrong, on every rank."""
        own = self._outcome
        codes = self._comm.control_gather(own.code if own is not None else 0)
        self._phase, self._outcome = Phase.IDLE, None
        if self._comm.rank == 0:
            self._writer.submit(AbandonTask(self._store.place, self._state.step, self._draft_token))
        failed = [rank for rank, code in enumerate(codes) if code]
        message = own.message if own is not None and own.code else _describe_failures(failed, codes)
        if LEASE_LOST in codes:
            raise LeaseLostError(message)
        if NON_FINITE in codes:
            if own is None or own.code != NON_FINITE:
                what = f"step {self._state.step} is not saved: NaN or infinite values"
                message = f"{what}: rank {failed[0]} names the tensor"
            raise NonFiniteError(f"{message} (ranks {failed[:8]}); resume from the last checkpoint")
        raise SaveError(f"{self._path}: not saved: {message}. It needs {self._needed_bytes / MIB:.1f} MiB,"
                        f" {self._room()}. {UNTOUCHED}")

    def _room(self) -> str:
        try:
            free = self._store.free_bytes()
        except OSError as error:
            return f"free space unknown ({error})"
        return "where space has no limit" if free is None else f"{free / MIB:.1f} MiB are free"


UNTOUCHED = "The earlier checkpoints are untouched"


def save_checkpoint(
    store: Store, run: RunRecord, state: RunState, pieces: Iterable[StatePiece], *, comm: Comm,
    retention: Retention, claim: LeaseClaim | None = None, probe: ProbeRecord | None = None,
    writer: Writer | None = None,
) -> Path | str:
    """Saves a run and waits until it is safe: a `Saver` for one save. Every rank calls it.

    Returns:
        Where the checkpoint is. A checkpoint of this step that exists already is left as it is.

    Raises:
        As `Saver.advance`.
    """
    writer = writer or InlineWriter()
    saver = Saver(store, run, comm=comm, retention=retention, writer=writer, claim=claim)
    try:
        saver.start(state, pieces, probe)
        saver.finish()
    finally:
        saver.close()
    return store.path(state.step)


def build_writer(is_asynchronous: bool, device: torch.device) -> Writer:
    """The writer of a rank; asynchronous where the system has files in memory (Linux)."""
    if not is_asynchronous or not hasattr(os, "memfd_create"):
        return InlineWriter()
    return ProcessWriter(pin_memory) if device.type == "cuda" else ProcessWriter()


def pin_memory(address: int, size_bytes: int) -> None:
    """Locks memory so that a GPU copies into it at full speed; where the driver refuses, copies are only slower."""
    torch.cuda.cudart().cudaHostRegister(address, size_bytes, 0)


def live_pieces(pieces: Iterable[StatePiece]) -> LivePieces:
    """The owned pieces of a rank."""
    owned = [piece for piece in pieces if piece.is_owner]
    records = tuple(
        PieceRecord(piece.key, tuple(piece.global_shape), piece.box.starts, piece.box.stops) for piece in owned
    )
    tensors = [piece.tensor.detach() for piece in owned]
    return LivePieces(records, _HostArrays(tensors), tensors)


@dataclass(frozen=True)
class _HostArrays:
    """The tensors as numpy arrays, of GPU tensors one at a time."""

    tensors: Sequence[torch.Tensor]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (tensor.cpu().numpy() for tensor in self.tensors)


def _describe_failures(failed: Sequence[int], codes: Sequence[int]) -> str:
    others = f" (and {len(failed) - 1} more ranks)" if len(failed) > 1 else ""
    code = codes[failed[0]]
    return f"rank {failed[0]}{others} failed: {os.strerror(code) if code > FAILED else 'see its own message'}"
