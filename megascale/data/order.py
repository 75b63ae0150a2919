"""Which row of which shard of which corpus a run reads at which place: a pure function of one integer.

The rows of a run are numbered 0, 1, 2, ... without end; number g is the g-th row that any replica reads. Everything
that may change in a run's life (replicas, batch size, micro-batch size) is absent from the function, so the state of
the data path is one integer, and a run resumes anywhere.

1. Row number g reads the corpus that the mixture has there, and is in lane g mod V (`megascale.data.weave`).
2. A corpus of N rows is read epoch by epoch: its first N row numbers read each of its rows exactly once, then the next
   N do. An epoch deals its rows, which lie in the order of its permuted shards, out to the lanes: each owns a
   contiguous stretch, as long as the lane will need while the stage lasts, and so stays on few shards.
3. A lane's stretch is cut into windows, and a Feistel permutation shuffles the rows of a window among themselves.
   The first window is shortened by another amount in each lane, so that not all lanes turn to new shards at once.
4. A stage of the mixture that begins within an epoch deals out anew what each lane has left, laid end to end. No deal
   looks beyond its own stage, so what is read before a stage doesn't depend on it: stages can be added on resuming.

A corpus takes its randomness from its name, so that another corpus beside it doesn't shuffle it otherwise.

Source: lanes are the canonical nodes of MosaicML streaming; a mixture with exact counts and stages is Levanter's.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megascale.data.mixture import MixtureStage
from megascale.data.permutation import derive_key, hash_name, permute_below
from megascale.data.weave import Weave
from megascale.errors import DataError

SHARDS_KEY, WINDOW_KEY = 1, 2
"""Separate the hashes of the two permutations."""
EPOCHS_KEPT = 2
"""A batch may straddle two epochs of a corpus."""


class CorpusShape(NamedTuple):
    """What the order knows of a corpus: its name, and the rows of each shard; shards without rows are allowed."""

    name: str
    rows_per_shard: np.ndarray


class Places(NamedTuple):
    """Where rows lie, int64, one element per row number: corpus, its epoch, shard, row within the shard."""

    corpora: np.ndarray
    epochs: np.ndarray
    shards: np.ndarray
    rows: np.ndarray


class Deal(NamedTuple):
    """How the rows of an epoch that were left at some row number are dealt out, one element per lane.

    Attributes:
        first_row: the row number from which it holds.
        lane_first: rows of the corpus that the lane reads before it.
        lane_rows: rows that the lane gets.
        lane_start: where they begin in what is dealt out.
        left_first: of the deal before, the first row that the lane had not read; zeros in the first deal.
        left_start: where the lane's remainder begins in what is dealt out; unused in the first deal.
    """

    first_row: int
    lane_first: np.ndarray
    lane_rows: np.ndarray
    lane_start: np.ndarray
    left_first: np.ndarray
    left_start: np.ndarray


@dataclass(frozen=True)
class Epoch:
    """The tables of one epoch of a corpus.

    Attributes:
        number: of the epoch, from 0.
        first_row: the epoch is the rows of the corpus from this row number on.
        stop_row: and below this one.
        deals: in the order of their first rows; at least one.
        shard_order: the epoch's permutation of the shards.
        shard_starts: where each permuted shard begins; one more than shards, the last one is the rows of the corpus.
    """

    number: int
    first_row: int
    stop_row: int
    deals: tuple[Deal, ...]
    shard_order: np.ndarray
    shard_starts: np.ndarray

    def trace_back(self, row_numbers: np.ndarray, lanes: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, ...]:
        """Which lane of the first deal owned each row, and as which of its rows: (lanes, rows within the lane)."""
        if len(self.deals) == 1:
            return lanes, counts - self.deals[0].lane_first[lanes]
        deal_numbers = np.searchsorted([deal.first_row for deal in self.deals], row_numbers, "right") - 1
        lane_first = np.stack([deal.lane_first for deal in self.deals])
        lanes, in_lane = lanes.copy(), counts - lane_first[deal_numbers, lanes]
        for number in range(len(self.deals) - 1, 0, -1):
            deal, later = self.deals[number], np.flatnonzero(deal_numbers >= number)
            places = deal.lane_start[lanes[later]] + in_lane[later]
            owners = np.searchsorted(deal.left_start, places, "right") - 1
            lanes[later], in_lane[later] = owners, deal.left_first[owners] + places - deal.left_start[owners]
        return lanes, in_lane


class RowOrder:
    """The order of a run over a blend of corpora.

    Args:
        corpora: in the order of their names.
        stages: the mixtures, the first one from row 0, with one count per corpus.
        seed: a non-negative integer below 2^63.
        num_lanes: lanes V; row numbers are dealt out to them in turn.
        window_rows: rows of a lane that are shuffled among themselves.

    All are part of the order: a run keeps them for its life, but for stages that it has not reached.

    Raises:
        DataError: a corpus to be read has no rows.
    """

    def __init__(
        self, corpora: Sequence[CorpusShape], stages: Sequence[MixtureStage], seed: int, num_lanes: int = 64,
        window_rows: int = 4096,
    ):
        names = [corpus.name for corpus in corpora]
        assert names == sorted(set(names)), f"corpora not in the order of their names: {names}"
        self.corpora, self.stages = tuple(corpora), tuple(stages)
        self.num_lanes, self.window_rows = num_lanes, window_rows
        self.num_rows = [int(np.sum(corpus.rows_per_shard)) for corpus in corpora]
        self._weave = Weave(stages, num_lanes)
        self._keys = derive_key(seed, np.array([hash_name(name) for name in names], np.uint64))
        self._epochs = [deque(maxlen=EPOCHS_KEPT) for _ in corpora]
        for name, num_rows, counts in zip(names, self.num_rows, self._weave.counts.T, strict=True):
            if num_rows == 0 and counts.any():
                raise DataError(f"corpus {name!r} has no rows, and the mixture reads it; give it the weight 0 or text")

    def locate(self, row_numbers: Sequence[int] | np.ndarray) -> Places:
        """Where the rows of some row numbers lie.

        Cost: about 0.5 ms a call and 0.5 us a row, and O(shards + lanes) when a new epoch of a corpus begins.
        """
        row_numbers = np.asarray(row_numbers, np.int64)
        lanes = row_numbers % self.num_lanes
        corpora, counts = self._weave.locate(row_numbers)
        epochs, lane_rows, lane_start = (np.empty_like(row_numbers) for _ in range(3))
        in_lane, owners = np.empty_like(row_numbers), np.empty_like(row_numbers)
        parts = []
        for corpus in np.unique(corpora).tolist():
            for epoch, chosen in self._split_by_epoch(corpus, row_numbers, np.flatnonzero(corpora == corpus)):
                parts.append((epoch, chosen))
                owner, in_lane[chosen] = epoch.trace_back(row_numbers[chosen], lanes[chosen], counts[chosen])
                owners[chosen], epochs[chosen], deal = owner, epoch.number, epoch.deals[0]
                lane_rows[chosen], lane_start[chosen] = deal.lane_rows[owner], deal.lane_start[owner]
        places = lane_start + self._shuffle(self._keys[corpora], epochs, owners, in_lane, lane_rows)
        shards, rows = np.empty_like(row_numbers), np.empty_like(row_numbers)
        for epoch, chosen in parts:
            position = np.searchsorted(epoch.shard_starts, places[chosen], "right") - 1
            shards[chosen], rows[chosen] = epoch.shard_order[position], places[chosen] - epoch.shard_starts[position]
        return Places(corpora, epochs, shards, rows)

    def replica_rows(self, first_row: int, num_rows: int, replica: int, num_replicas: int) -> np.ndarray:
        """The row numbers of [first_row, first_row + num_rows) that one of `num_replicas` replicas reads.

        Each replica takes a contiguous part of the rows sorted by lane, so it stays on few lanes. Replica after
        replica, the parts give the same sequence for any number of replicas.
        """
        row_numbers = np.arange(first_row, first_row + num_rows)
        by_lane = row_numbers[np.argsort(row_numbers % self.num_lanes, kind="stable")]
        return by_lane[replica * num_rows // num_replicas : (replica + 1) * num_rows // num_replicas]

    @property
    def period(self) -> int:
        """Rows in a row that hold each corpus exactly as often as its count says."""
        return self._weave.period

    def rows_before(self, row_number: int) -> np.ndarray:
        """Rows of each corpus among the row numbers below one, int64."""
        return self._weave.lane_counts(row_number).sum(1)

    def _shuffle(
        self, keys: np.ndarray, epochs: np.ndarray, lanes: np.ndarray, in_lane: np.ndarray, lane_rows: np.ndarray
    ) -> np.ndarray:
        """Permutes the rows of each window of a lane among themselves."""
        first_window = np.minimum(lanes * self.window_rows // self.num_lanes, lane_rows)
        is_first = in_lane < first_window
        windows = np.where(is_first, 0, 1 + (in_lane - first_window) // self.window_rows)
        starts = np.where(is_first, 0, first_window + (windows - 1) * self.window_rows)
        sizes = np.where(is_first, first_window, np.minimum(self.window_rows, lane_rows - starts))
        return starts + permute_below(in_lane - starts, sizes, derive_key(keys, WINDOW_KEY, epochs, lanes, windows))

    def _split_by_epoch(
        self, corpus: int, row_numbers: np.ndarray, chosen: np.ndarray
    ) -> Iterator[tuple[Epoch, np.ndarray]]:
        """Yields the epochs that rows of a corpus belong to, each with the indices of its rows."""
        while len(chosen):
            epoch = self._epoch_at(corpus, int(row_numbers[chosen[0]]))
            inside = (row_numbers[chosen] >= epoch.first_row) & (row_numbers[chosen] < epoch.stop_row)
            assert inside[0], "a row outside its epoch"
            yield epoch, chosen[inside]
            chosen = chosen[~inside]

    def _epoch_at(self, corpus: int, row_number: int) -> Epoch:
        """The epoch of a row number that reads the corpus."""
        for epoch in tuple(self._epochs[corpus]):
            if epoch.first_row <= row_number < epoch.stop_row:
                return epoch
        number = int(self._weave.lane_counts(row_number, corpus).sum()) // self.num_rows[corpus]
        epoch = self._build_epoch(corpus, number)
        self._epochs[corpus].appendleft(epoch)
        return epoch

    def _build_epoch(self, corpus: int, number: int) -> Epoch:
        rows_per_shard, num_rows = self.corpora[corpus].rows_per_shard, self.num_rows[corpus]
        first_row = self._weave.row_after(corpus, number * num_rows)
        stop_row = self._weave.row_after(corpus, (number + 1) * num_rows)
        shard_hashes = derive_key(self._keys[corpus], SHARDS_KEY, number, np.arange(len(rows_per_shard)))
        shard_order = np.argsort(shard_hashes, kind="stable")
        shard_starts = np.concatenate([[0], np.cumsum(rows_per_shard[shard_order])])
        deals = self._deal_out(corpus, first_row, stop_row, (number + 1) * num_rows)
        return Epoch(number, first_row, stop_row, deals, shard_order, shard_starts)

    def _deal_out(self, corpus: int, first_row: int, stop_row: int, stop_count: int) -> tuple[Deal, ...]:
        """The deals of an epoch: one when it begins, one for each stage that begins within it and reads the corpus."""
        weave, deals = self._weave, []
        last_stage = weave.stage_at(stop_row - 1)
        for stage in range(weave.stage_at(first_row), last_stage + 1):
            if self.stages[stage].counts[corpus] == 0:
                continue
            start = max(first_row, self.stages[stage].first_row)
            lane_first = weave.lane_counts(start, corpus, stage)
            # Where the epoch would end if this stage never did.
            stop = stop_row if stage == last_stage else weave.row_after(corpus, stop_count, stage)
            lane_rows = weave.lane_counts(stop, corpus, stage) - lane_first
            left_first, left_rows = np.zeros_like(lane_rows), np.zeros_like(lane_rows)
            if deals:
                left_first = lane_first - deals[-1].lane_first
                left_rows = deals[-1].lane_rows - left_first
            deals.append(Deal(
                start, lane_first, lane_rows, np.cumsum(lane_rows) - lane_rows, left_first,
                np.cumsum(left_rows) - left_rows,
            ))
        return tuple(deals)
