"""From a run's position, one integer, to the micro-batches of a replica."""

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from megascale.config.batch_plan import BatchPlan
from megascale.data.batch import Batch
from megascale.data.images import plain
from megascale.data.ledger import StepCounts, count_rows
from megascale.data.location import is_local
from megascale.data.objectives import Arrays, RowObjective, wants_partners
from megascale.data.order import Places
from megascale.data.permutation import derive_key
from megascale.data.prefetch import Prefetched
from megascale.data.row import Row
from megascale.data.rows import Corpus, check_batches
from megascale.data.stream import Fault, Stream

STEPS_AHEAD = 2
"""Steps that the prefetch thread makes ahead: one may be late by a whole step without a wait."""
VALIDATION_KEY = 5
"""Separates what is drawn for validation rows, which are the same in every pass, from the keys of training rows."""
ROWS_LOCATED = 1024
"""Rows that are located in one call where steps are small."""
HINT_STEPS = 64
"""Steps ahead that stores are told of: longer than the fetch of a shard takes."""


class StepData(NamedTuple):
    """What one replica reads in one step.

    Attributes:
        micro_batches: in their order.
        counts: of this replica's rows.
        faults: shards that some of the rows couldn't be read from.
    """

    micro_batches: list[Batch]
    counts: StepCounts
    faults: tuple[Fault, ...]


class Loader:
    """The training rows of one replica, step after step, from any position.

    Args:
        stream: the rows of the run.
        batches: rows of each step over all replicas.
        micro_rows: rows of one micro-batch.
        replica: number of this replica.
        num_replicas: replicas that share each step.
        is_pinned: whether batches lie in memory that a GPU copies from without waiting.

    Raises:
        ConfigError: the rows of a step can't be dealt out evenly.
        DataError: the corpora have fewer rows than a step.
    """

    def __init__(
        self, stream: Stream, batches: BatchPlan, micro_rows: int, replica: int, num_replicas: int,
        is_pinned: bool = False,
    ):
        check_batches(stream.corpora, batches, micro_rows, num_replicas)
        self.stream, self.batches, self.micro_rows = stream, batches, micro_rows
        self.replica, self.num_replicas, self.is_pinned = replica, num_replicas, is_pinned

    def steps_from(self, step: int) -> Prefetched[StepData]:
        """Yields this replica's part of each step without end, from a step on.

        A thread makes steps ahead; its errors are raised here. Close the iterator to end the thread.
        """
        return Prefetched(self._make_steps(step), STEPS_AHEAD)

    def row_numbers(self, step: int) -> np.ndarray:
        """The row numbers of this replica's part of a step, micro-batch after micro-batch."""
        first_row, num_rows = self.batches.first_row(step), self.batches.rows_of(step)
        return self.stream.order.replica_rows(first_row, num_rows, self.replica, self.num_replicas)

    def _make_steps(self, step: int) -> Iterator[StepData]:
        hints = ShardHints(self)
        while True:
            for row_numbers, places in self._locate_steps(step):
                hints.give(step)
                yield self._make_step(row_numbers, places)
                step += 1

    def _locate_steps(self, step: int) -> Iterator[tuple[np.ndarray, Places]]:
        """Row numbers and places of this replica's part of some steps, located in one call: it costs as 200 rows do."""
        steps = [self.row_numbers(step)]
        while (len(steps) + 1) * len(steps[-1]) <= ROWS_LOCATED:
            steps.append(self.row_numbers(step + len(steps)))
        places = self.stream.order.locate(np.concatenate(steps))
        first = 0
        for row_numbers in steps:
            part = slice(first, first + len(row_numbers))
            yield row_numbers, Places(*(array[part] for array in places))
            first = part.stop

    def make_step(self, step: int) -> StepData:
        """Reads this replica's part of one step."""
        row_numbers = self.row_numbers(step)
        return self._make_step(row_numbers, self.stream.order.locate(row_numbers))

    def _make_step(self, row_numbers: np.ndarray, places: Places) -> StepData:
        rows, places, faults = self.stream.read_at(row_numbers, places)
        arrays = self.stream.objective.assemble(rows, self.stream.keys_of(row_numbers))
        labels = int(np.count_nonzero(arrays.labels_BT >= 0))
        counts = count_rows(len(self.stream.corpora), places.corpora, row_numbers, rows, labels)
        batches = [build_batch(arrays, row_numbers, slice(begin, begin + self.micro_rows))
                   for begin in range(0, len(row_numbers), self.micro_rows)]
        return StepData([batch.pin_memory() for batch in batches] if self.is_pinned else batches, counts, faults)


class ShardHints:
    """Tells the stores of remote corpora which shards the next steps read, in the order of their first use."""

    def __init__(self, loader: Loader):
        self.loader = loader
        corpora = loader.stream.corpora
        self.remote = [number for number, corpus in enumerate(corpora) if not is_local(corpus.manifest.folder)]
        self.ahead: deque[np.ndarray] = deque()

    def give(self, step: int) -> None:
        """Tells of the steps from one on; called for one step after the other. Cost: locates the rows of one step."""
        if not self.remote:
            return
        while len(self.ahead) < HINT_STEPS:
            places = self.loader.stream.order.locate(self.loader.row_numbers(step + len(self.ahead)))
            self.ahead.append(np.stack([places.corpora, places.shards], axis=1))
        ahead = np.concatenate(self.ahead)
        for corpus in self.remote:
            shards = ahead[ahead[:, 0] == corpus, 1]
            _, first_uses = np.unique(shards, return_index=True)
            self.loader.stream.corpora[corpus].store.prefetch(shards[np.sort(first_uses)].tolist())
        self.ahead.popleft()


def build_batch(arrays: Arrays, row_numbers: np.ndarray, part: slice) -> Batch:
    """Makes the batch of some of the rows."""
    values = arrays._asdict() | {"row_numbers_B": row_numbers}
    return Batch(**{
        name: torch.from_numpy(np.ascontiguousarray(array[part])) for name, array in values.items() if array is not None
    })


def read_unshuffled(corpus: Corpus, number: int, has_partner: bool) -> Row:
    """A row by its number in the order of the shards, with its neighbour by number where that is wanted."""
    row = corpus.read(*corpus.locate_unshuffled(number))
    if not has_partner or corpus.num_rows < 2:
        return row
    neighbour = number ^ 1 if number ^ 1 < corpus.num_rows else number - 1
    return row._replace(partner=corpus.read(*corpus.locate_unshuffled(neighbour)).tokens)


def evaluation_batches(
    corpus: Corpus, objective: RowObjective, micro_rows: int, replica: int, num_replicas: int,
    max_rows: int | None = None,
) -> Iterator[Batch]:
    """Yields one replica's batches of a validation pass: each row once over all replicas, in the order of the shards.

    Every replica gets the same number of batches; rows without labels fill the last ones. Documents stay as they are,
    rearranged in training or not.

    Args:
        corpus: its validation split.
        objective: makes inputs and labels of rows.
        micro_rows: rows of a batch.
        replica: number of this replica.
        num_replicas: replicas that share the pass.
        max_rows: the first so many rows only; documents were shuffled when the corpus was built, so they are a sample.
    """
    num_rows = min(corpus.num_rows, max_rows or corpus.num_rows)
    for first in range(replica * micro_rows, num_rows + replica * micro_rows, num_replicas * micro_rows):
        row_numbers = np.arange(first, first + micro_rows)
        row_numbers[row_numbers >= num_rows] = -1
        rows = [read_unshuffled(corpus, number, wants_partners(objective)) if number >= 0 else None
                for number in row_numbers.tolist()]
        arrays = plain(objective).assemble(rows, derive_key(VALIDATION_KEY, row_numbers))
        yield build_batch(arrays, row_numbers, slice(None))
