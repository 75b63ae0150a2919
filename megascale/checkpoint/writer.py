"""Carrying out the tasks of a save: in this process, or in one beside it that shares only memory with it.

Both sides of the second way are here: `ProcessWriter` in the rank, and `python -m megascale.checkpoint.writer FD`,
which imports no torch. They talk in lines of JSON over pipes; the tensors lie in a memory file that both map, one piece
after the other. The writer dies with its rank, and no signal but SIGKILL stops it: a scheduler's SIGTERM to all
processes must not end a save that the rank is waiting for.
"""

import json
import mmap
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np

from megascale.checkpoint.index import BYTES_PER_ELEMENT
from megascale.checkpoint.persist import AbandonTask, CommitTask, WriteTask, abandon, commit, write_part
from megascale.checkpoint.pieces import PieceRecord, RankPieces
from megascale.checkpoint.records import parse_record, to_json
from megascale.errors import CheckpointError, LeaseLostError, NonFiniteError
from megascale.parallel.orphan import signal_when_parent_dies

Task = WriteTask | CommitTask | AbandonTask
TASKS = {"write": WriteTask, "commit": CommitTask, "abandon": AbandonTask}
KINDS = {kind: name for name, kind in TASKS.items()}
BLOCKED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Signals that don't reach a writer process: what schedulers and terminals send to all processes of a job."""

OK = 0
FAILED = -1
NON_FINITE = -2
LEASE_LOST = -3
"""Codes of an outcome; a positive one is the system's error number."""


@dataclass(frozen=True)
class Outcome:
    """How a task ended.

    Attributes:
        task: its name in `TASKS`.
        code: see above; the same number means the same on every rank.
        message: for the user.
    """

    task: str
    code: int
    message: str


class Writer(Protocol):
    """What carries out tasks, one after the other."""

    def submit(self, task: Task, pieces: RankPieces | None = None) -> None:
        """Gives a task; a `WriteTask` comes with the pieces, which may change once this returns."""

    def outcome(self, timeout_s: float | None) -> Outcome | None:
        """The outcome of the newest task, waiting so long for it; a timeout of None waits for ever.

        Returns:
            None when it isn't there in time, or was asked for before. Outcomes of earlier tasks are passed over.
        """

    def close(self) -> None:
        """Ends the writer, and what it may be doing."""


class InlineWriter:
    """Carries out each task at once: simple, and the rank waits for the disk."""

    def __init__(self) -> None:
        self._outcome: Outcome | None = None

    def submit(self, task: Task, pieces: RankPieces | None = None) -> None:
        """See `Writer`."""
        self._outcome = perform(task, pieces)

    def outcome(self, timeout_s: float | None) -> Outcome | None:
        """See `Writer`."""
        outcome, self._outcome = self._outcome, None
        return outcome

    def close(self) -> None:
        """See `Writer`."""


class Snapshot:
    """Memory that the rank and its writer share: the pieces of one save, one after the other."""

    def __init__(self, descriptor: int, size_bytes: int):
        self.size_bytes = size_bytes
        if os.fstat(descriptor).st_size < size_bytes:
            os.ftruncate(descriptor, size_bytes)
        self._map = mmap.mmap(descriptor, size_bytes)

    @property
    def address(self) -> int:
        """Of its first byte."""
        return np.frombuffer(self._map, np.uint8).ctypes.data

    def arrays(self, records: Sequence[PieceRecord]) -> Iterator[np.ndarray]:
        """Yields the memory of each piece."""
        position = 0
        for record in records:
            yield np.frombuffer(self._map, np.float32, record.box.numel, position)
            position += record.box.numel * BYTES_PER_ELEMENT


class ProcessWriter:
    """Hands tasks to a process of its own; the rank waits only while the pieces are copied.

    Args:
        pin: is given address and size of the shared memory once, so that a GPU can copy into it directly.
    """

    def __init__(self, pin: Callable[[int, int], None] = lambda address, size_bytes: None) -> None:
        self._pin = pin
        self._descriptor = os.memfd_create("megascale-snapshot")
        self._process: subprocess.Popen | None = None
        self._snapshot: Snapshot | None = None
        self._records: tuple[PieceRecord, ...] | None = None
        self._num_unanswered = 0

    def submit(self, task: Task, pieces: RankPieces | None = None) -> None:
        """See `Writer`. A writer that has died is started anew with the next save."""
        if pieces is not None:
            self._ensure_process()
        self._num_unanswered += 1
        try:
            if pieces is not None:
                self._stage(pieces)
            self._send({KINDS[type(task)]: asdict(task)})
        except BrokenPipeError:  # `outcome` tells how it ended
            return

    def outcome(self, timeout_s: float | None) -> Outcome | None:
        """See `Writer`."""
        while self._num_unanswered:
            outcome = self._next_answer(timeout_s)
            if outcome is None:
                return None
            self._num_unanswered = self._num_unanswered - 1 if outcome.task else 0  # a dead writer answers none of them
            if not self._num_unanswered:
                return outcome
        return None

    def _next_answer(self, timeout_s: float | None) -> Outcome | None:
        if self._process is None:
            return Outcome("", FAILED, "there is no writer process")
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        if not ready:
            return None
        line = self._process.stdout.readline()
        if line.endswith(b"\n"):
            return parse_record(Outcome, line, "the checkpoint writer's answer")
        code = self._process.wait()
        self._forget()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return Outcome("", FAILED, f"the process that writes checkpoints {how}")

    def close(self) -> None:
        """See `Writer`."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._forget()

    def _ensure_process(self) -> None:
        if self._process is not None and self._process.poll() is not None:  # it died with nothing to do
            self._forget()
        if self._process is None:
            self._num_unanswered = 0
            earlier = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)  # inherited, so there is no moment without
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "megascale.checkpoint.writer", str(self._descriptor)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[self._descriptor], bufsize=0,
                    env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, earlier)

    def _stage(self, pieces: RankPieces) -> None:
        if pieces.records != self._records:
            size_bytes = sum(record.box.numel for record in pieces.records) * BYTES_PER_ELEMENT
            self._snapshot = Snapshot(self._descriptor, max(size_bytes, 1))
            self._pin(self._snapshot.address, self._snapshot.size_bytes)
            self._send({"pieces": [asdict(record) for record in pieces.records]})
            self._records = pieces.records
        pieces.copy_to(self._snapshot.arrays(pieces.records))

    def _send(self, message: dict) -> None:
        if self._process is not None:
            rest = memoryview(to_json(message))
            while rest:
                rest = rest[self._process.stdin.write(rest):]

    def _forget(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            pipe.close()
        self._process = self._records = None


def perform(task: Task, pieces: RankPieces | None) -> Outcome:
    """Carries out a task; a failure is an outcome."""
    name = KINDS[type(task)]
    try:
        match task:
            case WriteTask():
                write_part(task, pieces)
            case CommitTask():
                commit(task)
            case AbandonTask():
                abandon(task)
    except NonFiniteError as error:
        return Outcome(name, NON_FINITE, str(error))
    except LeaseLostError as error:
        return Outcome(name, LEASE_LOST, str(error))
    except CheckpointError as error:
        return Outcome(name, FAILED, str(error))
    except OSError as error:
        return Outcome(name, error.errno or FAILED, str(error))
    return Outcome(name, OK, "")


def serve(descriptor: int) -> None:
    """Carries out what comes on the standard input, until it ends; the process's main work."""
    records: tuple[PieceRecord, ...] = ()
    snapshot = None
    for line in sys.stdin.buffer:
        (name, value), = json.loads(line).items()
        if name == "pieces":
            records = tuple(parse_record(PieceRecord, to_json(record), "a piece") for record in value)
            size_bytes = sum(record.box.numel for record in records) * BYTES_PER_ELEMENT
            snapshot = Snapshot(descriptor, max(size_bytes, 1))
            continue
        task = parse_record(TASKS[name], to_json(value), f"the task {name}")
        pieces = RankPieces(records, snapshot.arrays(records)) if name == "write" else None
        sys.stdout.buffer.write(to_json(asdict(perform(task, pieces))))
        sys.stdout.buffer.flush()


def main() -> None:
    """Outlives its rank not at all."""
    signal_when_parent_dies(signal.SIGKILL)
    serve(int(sys.argv[1]))


if __name__ == "__main__":
    main()
