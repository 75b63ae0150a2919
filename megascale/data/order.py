"""Which row of which shard a run reads at which place: a pure function of one integer.

The rows of a run are numbered 0, 1, 2, ... without end; number g is the g-th row that any replica reads. Everything
that may change in a run's life (replicas, batch size, micro-batch size) is absent from the function, so the state of
the data path is one integer, and a run resumes anywhere.

Epoch e is the row numbers [e N, (e + 1) N) of a corpus of N rows, and reads each row exactly once:

1. Row number g is in lane g mod V. Each of the V lanes owns a contiguous stretch of the epoch's rows, which lie in the
   order of the epoch's permuted shards, so a lane stays on few shards.
2. A lane's stretch is cut into windows, and a Feistel permutation shuffles the rows of a window among themselves.
   The first window is shortened by another amount in each lane, so that not all lanes turn to new shards at once.

Numpy's random generators may change their streams between releases (NEP 19), so the hash is spelt out here; a test
pins its values for ever.

Source: splitmix64 (Steele, Lea, Flood, OOPSLA 2014); Feistel permutation with cycle walking (Black, Rogaway, CT-RSA
2002, section 4); lanes are the canonical nodes of MosaicML streaming.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

FEISTEL_ROUNDS = 4
SHARDS_KEY, WINDOW_KEY = 1, 2
"""Separate the hashes of the two permutations."""


def splitmix64(x: np.ndarray) -> np.ndarray:
    """Hashes each element of a uint64 array to a uint64, bijectively; sums and products wrap around."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def derive_key(*parts: int | np.ndarray) -> np.ndarray:
    """Hashes a sequence of non-negative integers, or of 1-D arrays that broadcast, to a 1-D array of uint64 keys."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = splitmix64(key ^ np.asarray(part, np.uint64))
    return key


def permute_below(x: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Permutes [0, size) by a key: elementwise, each element with its own size and key.

    The Feistel network permutes a power of 4 that is at least `size` and less than 4 times it; an image outside
    [0, size) is permuted again until it is inside, which keeps the whole a bijection.
    """
    size = np.asarray(size, np.uint64)
    _, size_bits = np.frexp((size - np.uint64(1)).astype(np.float64))  # the exponent of n is its bit length
    half_bits = np.maximum((size_bits + 1) // 2, 1).astype(np.uint64)
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    y = np.asarray(x).astype(np.uint64)
    outside = np.arange(len(y))
    while len(outside):
        left, right = y[outside] >> half_bits[outside], y[outside] & mask[outside]
        for number in range(FEISTEL_ROUNDS):
            round_hash = splitmix64(right ^ key[outside] ^ np.uint64(number << 56))
            left, right = right, left ^ (round_hash & mask[outside])
        y[outside] = (left << half_bits[outside]) | right
        outside = outside[y[outside] >= size[outside]]
    return y.astype(np.int64)


def count_in_lanes(row_number: int, num_lanes: int) -> np.ndarray:
    """How many row numbers below `row_number` each lane has."""
    return row_number // num_lanes + (np.arange(num_lanes) < row_number % num_lanes)


@dataclass(frozen=True)
class Epoch:
    """The tables of one epoch: which lane owns what, and where the permuted shards lie.

    Attributes:
        lane_first: per lane, its row numbers before the epoch.
        lane_rows: per lane, its rows of the epoch.
        lane_start: per lane, where its stretch of the permuted rows begins.
        shard_order: the epoch's permutation of the shards.
        shard_starts: where each permuted shard begins; one more than shards, the last one is the rows of the corpus.
    """

    lane_first: np.ndarray
    lane_rows: np.ndarray
    lane_start: np.ndarray
    shard_order: np.ndarray
    shard_starts: np.ndarray


class RowOrder:
    """The order of a run over one corpus.

    Args:
        rows_per_shard: rows of each shard; shards without rows are allowed.
        seed: a non-negative integer below 2^63.
        num_lanes: lanes V; row numbers are dealt out to them in turn.
        window_rows: rows of a lane that are shuffled among themselves.

    All four are part of the order: a run keeps them for its life.
    """

    def __init__(
        self, rows_per_shard: Sequence[int] | np.ndarray, seed: int, num_lanes: int = 64, window_rows: int = 4096
    ):
        self.rows_per_shard = np.asarray(rows_per_shard, np.int64)
        self.seed, self.num_lanes, self.window_rows = seed, num_lanes, window_rows
        self.num_rows = int(self.rows_per_shard.sum())
        assert self.num_rows > 0, "an order over no rows"
        self._epoch = lru_cache(2)(self._build_epoch)  # a batch may straddle two epochs

    def locate(self, row_numbers: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Maps row numbers to (epoch, shard, row within the shard), each int64 of the same length.

        Cost: about 0.5 us a row, and O(shards + lanes) when a new epoch begins.
        """
        row_numbers = np.asarray(row_numbers, np.int64)
        epochs = row_numbers // self.num_rows
        shards, rows = np.empty_like(row_numbers), np.empty_like(row_numbers)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            shards[chosen], rows[chosen] = self._locate_in_epoch(epoch, row_numbers[chosen])
        return epochs, shards, rows

    def replica_rows(self, first_row: int, num_rows: int, replica: int, num_replicas: int) -> np.ndarray:
        """The row numbers of [first_row, first_row + num_rows) that one of `num_replicas` replicas reads.

        Each replica takes a contiguous part of the rows sorted by lane, so it stays on few lanes. Replica after
        replica, the parts give the same sequence for any number of replicas.
        """
        row_numbers = np.arange(first_row, first_row + num_rows)
        by_lane = row_numbers[np.argsort(row_numbers % self.num_lanes, kind="stable")]
        return by_lane[replica * num_rows // num_replicas : (replica + 1) * num_rows // num_replicas]

    def _locate_in_epoch(self, number: int, row_numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        epoch = self._epoch(number)
        lane = row_numbers % self.num_lanes
        in_lane, rows_of_lane = row_numbers // self.num_lanes - epoch.lane_first[lane], epoch.lane_rows[lane]
        first_window = np.minimum(lane * self.window_rows // self.num_lanes, rows_of_lane)
        is_first = in_lane < first_window
        window = np.where(is_first, 0, 1 + (in_lane - first_window) // self.window_rows)
        start = np.where(is_first, 0, first_window + (window - 1) * self.window_rows)
        size = np.where(is_first, first_window, np.minimum(self.window_rows, rows_of_lane - start))
        key = derive_key(self.seed, WINDOW_KEY, number, lane, window)
        place = epoch.lane_start[lane] + start + permute_below(in_lane - start, size, key)
        position = np.searchsorted(epoch.shard_starts, place, "right") - 1
        return epoch.shard_order[position], place - epoch.shard_starts[position]

    def _build_epoch(self, number: int) -> Epoch:
        first = count_in_lanes(number * self.num_rows, self.num_lanes)
        rows = count_in_lanes((number + 1) * self.num_rows, self.num_lanes) - first
        shard_hashes = derive_key(self.seed, SHARDS_KEY, number, np.arange(len(self.rows_per_shard)))
        shard_order = np.argsort(shard_hashes, kind="stable")
        shard_starts = np.concatenate([[0], np.cumsum(self.rows_per_shard[shard_order])])
        return Epoch(first, rows, np.cumsum(rows) - rows, shard_order, shard_starts)
