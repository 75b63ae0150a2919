"""What a rank is doing right now, in a small file in memory that another process reads.

The rank writes a few numbers when it goes from one phase to the next: no system call, no lock, about a microsecond. Who
watches needs nothing of the rank, neither its interpreter's lock nor its cooperation, so a rank that is frozen, or
whose lock is held by a library, is seen as well. Times are CLOCK_MONOTONIC, which all processes of a machine share.
"""

import contextlib
import mmap
import os
import statistics
import struct
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

_LAYOUT = struct.Struct("<Q 16s 10q")
_BYTES = 4096
COMPUTE_WINDOW = 20
"""Steps whose median says how fast a rank computes: one hiccup doesn't move it."""


class Phase(StrEnum):
    """What a rank can be doing; each has a limit of its own (`megascale.config.cluster.LimitsConfig`)."""

    START = "start"  # from the process's start: interpreter and imports
    JOIN = "join"  # meeting the other ranks
    LOAD = "load"  # building the model, loading the checkpoint
    DATA = "data"  # waiting for the rows of a step
    AGREE = "agree"  # waiting for the other ranks at the start of a step
    COMPUTE = "compute"  # forward, backward, update
    EVALUATE = "evaluate"
    SAVE = "save"  # the part of a save that training waits for
    LOG = "log"
    CLOSE = "close"  # the run is over; logs end


@dataclass(frozen=True)
class Beat:
    """A rank at one moment; times in seconds of CLOCK_MONOTONIC of its machine.

    Attributes:
        phase: what it is doing.
        pid: its process.
        step: completed steps of the run; -1 before that is known.
        since_s: when it entered the phase, or last made progress in it.
        steps_taken: steps that this process took.
        slowest_step_s: its slowest step, the first one (compilation, warm-up) left out; 0 before the second.
        compute_s: median time that it computed alone in a step, waiting for no other rank; 0 when that isn't known.
        first_row: row of the stream with which the step begins.
        saved_step: the newest checkpoint known to be safe; -1 before there is one.
    """

    phase: Phase
    pid: int
    step: int
    since_s: float
    steps_taken: int
    slowest_step_s: float
    compute_s: float
    first_row: int
    saved_step: int


class Heartbeat:
    """Writes this rank's file. Without a path, as where nobody watches, it only keeps the numbers.

    Attributes:
        seconds: time spent in each phase so far, the present stay left out.
    """

    def __init__(self, path: Path | None = None):
        self._memory = _map(path, os.O_RDWR | os.O_CREAT) if path else bytearray(_BYTES)
        self._count, self._phase = 0, Phase.START
        self._step, self._steps_taken, self._first_row, self._saved_step = -1, 0, -1, -1
        self._slowest_s, self._step_began_s, self._compute_s = 0.0, 0.0, deque(maxlen=COMPUTE_WINDOW)
        self._median_s = 0.0
        self.seconds = dict.fromkeys(Phase, 0.0)
        self._entered_s = time.monotonic()
        self.enter(Phase.START)

    @property
    def phase(self) -> Phase:
        """What the rank is doing."""
        return self._phase

    def enter(self, phase: Phase) -> None:
        """Goes to another phase, or makes progress in the present one. Cost: about a microsecond."""
        now_ns = time.monotonic_ns()
        self.seconds[self._phase] += now_ns / 1e9 - self._entered_s
        self._phase, self._entered_s, self._count = phase, now_ns / 1e9, self._count + 1
        self._write(now_ns)

    @contextlib.contextmanager
    def within(self, phase: Phase) -> Iterator[None]:
        """A phase for the length of a block, then the one before it again."""
        before = self._phase
        self.enter(phase)
        yield
        self.enter(before)

    def begin_step(self, step: int, first_row: int) -> None:
        """A step begins: `step` are completed, the rows from `first_row` on are next."""
        self._step, self._first_row, self._step_began_s = step, first_row, time.monotonic()

    def end_step(self, compute_s: float) -> None:
        """The step is taken; `compute_s` of it this rank computed alone."""
        self._steps_taken += 1
        self._step += 1
        if self._steps_taken > 1:
            self._slowest_s = max(self._slowest_s, time.monotonic() - self._step_began_s)
            if compute_s:
                self._compute_s.append(compute_s)
                self._median_s = statistics.median(self._compute_s)

    def note_saved(self, step: int) -> None:
        """A checkpoint is safe."""
        self._saved_step = step

    def _write(self, now_ns: int) -> None:
        numbers = (
            os.getpid(), self._step, now_ns, self._steps_taken, round(self._slowest_s * 1e9),
            round(self._median_s * 1e9), self._first_row, self._saved_step, 0, self._count,
        )
        # The count stands at both ends: a reader that finds two different ones has met a write half done.
        _LAYOUT.pack_into(self._memory, 0, self._count, self._phase.encode(), *numbers)


def read_beat(path: Path) -> Beat | None:
    """What a rank wrote last; None before it wrote anything, or when it died in the middle of writing."""
    try:
        memory = _map(path, os.O_RDONLY)
    except (OSError, ValueError):
        return None
    with contextlib.closing(memory):
        for _ in range(100):
            count, phase, *numbers, again = _LAYOUT.unpack_from(memory)
            if count == again:
                break
    if not count or count != again:
        return None
    pid, step, since_ns, steps_taken, slowest_ns, compute_ns, first_row, saved_step, _ = numbers
    return Beat(
        Phase(phase.rstrip(b"\0").decode()), pid, step, since_ns / 1e9, steps_taken, slowest_ns / 1e9,
        compute_ns / 1e9, first_row, saved_step,
    )


def _map(path: Path, flags: int) -> mmap.mmap:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        if flags & os.O_CREAT:
            os.ftruncate(descriptor, _BYTES)
        access = mmap.ACCESS_WRITE if flags & os.O_CREAT else mmap.ACCESS_READ
        return mmap.mmap(descriptor, _BYTES, access=access)
    finally:
        os.close(descriptor)
