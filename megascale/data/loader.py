"""From a run's position, one integer, to the micro-batches of a replica."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from megascale.data.batch import Batch
from megascale.data.order import RowOrder
from megascale.data.packing import pack_rows
from megascale.data.prefetch import prefetch
from megascale.data.rows import CorpusRows, check_batch, read_rows

STEPS_AHEAD = 2
"""Steps that the prefetch thread makes ahead: one may be late by a whole step without a wait."""


class Loader:
    """The training rows of one replica, step after step, from any position.

    Args:
        rows: the training split.
        order: the order of the run over these rows.
        global_rows: rows of one step over all replicas.
        micro_rows: rows of one micro-batch.
        replica: number of this replica.
        num_replicas: replicas that share each step.

    Raises:
        ConfigError: the rows of a step can't be dealt out evenly.
        DataError: the corpus has fewer rows than a step.
    """

    def __init__(
        self, rows: CorpusRows, order: RowOrder, global_rows: int, micro_rows: int, replica: int, num_replicas: int
    ):
        assert np.array_equal(order.rows_per_shard, rows.rows_per_shard), "order and rows of two corpora"
        check_batch(rows, global_rows, micro_rows, num_replicas)
        self.rows, self.order = rows, order
        self.global_rows, self.micro_rows = global_rows, micro_rows
        self.replica, self.num_replicas = replica, num_replicas

    def steps_from(self, row: int) -> Iterator[list[Batch]]:
        """Yields this replica's micro-batches of each step without end, the first step beginning at a row number.

        A thread makes steps ahead; its errors are raised here. Close the iterator to end the thread.
        """
        return prefetch(self._make_steps(row), STEPS_AHEAD)

    def _make_steps(self, row: int) -> Iterator[list[Batch]]:
        while True:
            row_numbers = self.order.replica_rows(row, self.global_rows, self.replica, self.num_replicas)
            read = read_rows(self.rows, self.order, row_numbers)
            micro = [slice(begin, begin + self.micro_rows) for begin in range(0, len(read), self.micro_rows)]
            yield [build_batch(self.rows, read[part], row_numbers[part]) for part in micro]
            row += self.global_rows


def build_batch(rows: CorpusRows, read: Sequence[np.ndarray], row_numbers: np.ndarray) -> Batch:
    """Makes the batch of some rows; padding is the end-of-text token without label."""
    tokens_BT, labels_BT = pack_rows(read, rows.seq_len, rows.manifest.eos_id)
    return Batch(torch.from_numpy(tokens_BT), torch.from_numpy(labels_BT), torch.from_numpy(row_numbers.copy()))


def evaluation_batches(
    rows: CorpusRows, micro_rows: int, replica: int, num_replicas: int, max_rows: int | None = None
) -> Iterator[Batch]:
    """Yields one replica's batches of a validation pass: each row once over all replicas, in the order of the shards.

    Every replica gets the same number of batches; rows without labels fill the last ones.

    Args:
        rows: the validation split.
        micro_rows: rows of a batch.
        replica: number of this replica.
        num_replicas: replicas that share the pass.
        max_rows: the first so many rows only; documents were shuffled when the corpus was built, so they are a sample.
    """
    num_rows = min(rows.num_rows, max_rows or rows.num_rows)
    for first in range(replica * micro_rows, num_rows + replica * micro_rows, num_replicas * micro_rows):
        row_numbers = np.arange(first, first + micro_rows)
        row_numbers[row_numbers >= num_rows] = -1
        read = [rows.read(*rows.locate_unshuffled(number)) if number >= 0 else () for number in row_numbers.tolist()]
        yield build_batch(rows, read, row_numbers)
