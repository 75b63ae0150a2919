"""Ranks as threads that stay, each with a writer process of its own: what a run has, without training."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

from megascale.checkpoint.local_store import LocalStore
from megascale.checkpoint.retention import Retention
from megascale.checkpoint.save import Saver
from megascale.checkpoint.writer import ProcessWriter
from megascale.engine.base import StatePiece
from tests.support.checkpoint_ranks import RUN, ThreadComm, state_at

PATIENCE_S = 60.0


class SavingRanks:
    """Two or more ranks that save together, in one run folder after the other.

    A writer dies with the thread that started it, so the threads stay until `close`.
    """

    def __init__(self, world_size: int):
        values, barrier = [0] * world_size, Barrier(world_size)
        self._pool = ThreadPoolExecutor(world_size)
        self._comms = [ThreadComm(rank, values, barrier) for rank in range(world_size)]
        self.writers = [ProcessWriter() for _ in range(world_size)]
        self.savers: list[Saver] = []

    def enter(self, run_folder: Path, keep_last: int = 1) -> None:
        """Takes up a run folder."""
        self.savers = self.each(lambda rank: Saver(
            LocalStore(run_folder), RUN, comm=self._comms[rank], retention=Retention(keep_last),
            writer=self.writers[rank],
        ))

    def each(self, body: Callable[[int], object]) -> list:
        """Runs the body on every rank at once; gives each rank's result, or the exception that it ended with."""

        def attempt(rank: int):
            try:
                return body(rank)
            except Exception as error:
                return error

        return list(self._pool.map(attempt, range(len(self._comms))))

    def save(self, step: int, ranks: list[list[StatePiece]]) -> list:
        """Saves, all ranks at once; gives each rank's saved step or exception."""
        self.each(lambda rank: self.savers[rank].start(state_at(step), ranks[rank]))
        return self.finish()

    def save_in_turn(self, step: int, ranks: list[list[StatePiece]]) -> list:
        """As `save`, but a rank begins when those before it have written, so that the order of calls is always one.

        Not the first save in a run folder: the ranks talk to each other then.
        """
        for saver, pieces in zip(self.savers, ranks, strict=True):
            saver.start(state_at(step), pieces)
            wait_until(lambda saver=saver: saver.report()[0])
        return self.finish()

    def finish(self, patience_s: float = PATIENCE_S) -> list:
        """Waits for what is being saved; gives each rank's saved step or exception."""
        deadline_s = time.monotonic() + patience_s
        return self.each(lambda rank: self.savers[rank].finish(deadline_s))

    def pid(self, rank: int) -> int:
        """Of a rank's writer."""
        return self.writers[rank]._process.pid

    def close(self) -> None:
        """Ends writers and threads."""
        for writer in self.writers:
            writer.close()
        self._pool.shutdown()


def wait_until(is_true: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
    """Waits for something that should happen soon."""
    deadline_s = time.monotonic() + patience_s
    while not is_true():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.002)
