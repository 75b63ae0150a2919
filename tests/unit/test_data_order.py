"""The row order: exactly once per epoch, the same for any number of replicas, and the same for ever."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.data.order import RowOrder, derive_key, permute_below, splitmix64

SHARDS = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(sum)
SEEDS = st.integers(0, 2**63 - 1)

GOLDEN_SMALL = [
    (0, 2),
    (3, 0),
    (2, 1),
    (2, 6),
    (0, 1),
    (3, 2),
    (2, 4),
    (2, 5),
    (0, 0),
    (3, 1),
    (2, 2),
    (2, 8),
    (0, 4),
    (2, 0),
    (2, 3),
    (2, 7),
    (0, 3),
    (2, 6),
    (0, 0),
    (3, 0),
]
GOLDEN_BIG = [[0, 0, 0, 0, 1, 222222222], [0, 0, 0, 2, 1, 2], [8, 125, 40, 415, 1419, 35]]


def test_the_hash_is_splitmix64():
    """Reference values: the first outputs of splitmix64 from state 0 and 1234567."""
    states = np.array([0, 1234567], np.uint64)
    assert splitmix64(states).tolist() == [0xE220A8397B1DCDAF, 6457827717110365317]


def test_golden_order():
    """Pins the order for ever: a run that resumes under another release must read the same rows."""
    order = RowOrder([5, 0, 9, 3], seed=42, num_lanes=4, window_rows=3)
    epochs, shards, rows = order.locate(np.arange(20))
    assert epochs.tolist() == [0] * 17 + [1] * 3
    assert list(zip(shards.tolist(), rows.tolist(), strict=True)) == GOLDEN_SMALL
    big = RowOrder([1000, 2000, 1500], seed=7)
    assert [x.tolist() for x in big.locate([0, 1, 64, 4499, 4500, 10**12])] == GOLDEN_BIG


@settings(max_examples=2000, deadline=None)
@given(SHARDS, SEEDS, st.integers(1, 70), st.integers(1, 50), st.integers(0, 10**6))
def test_an_epoch_reads_every_row_once(rows_per_shard, seed, num_lanes, window_rows, epoch):
    """Caught mutations: `first_window` not bounded by the lane's rows; `lane_first` taken at epoch 0."""
    order = RowOrder(rows_per_shard, seed, num_lanes, window_rows)
    row_numbers = np.arange(epoch * order.num_rows, (epoch + 1) * order.num_rows)
    epochs, shards, rows = order.locate(row_numbers)
    assert (epochs == epoch).all()
    expected = [(shard, row) for shard, count in enumerate(rows_per_shard) for row in range(count)]
    assert sorted(zip(shards.tolist(), rows.tolist(), strict=True)) == expected


@settings(max_examples=200, deadline=None)
@given(SHARDS, SEEDS, st.integers(1, 70), st.integers(1, 50), st.data())
def test_a_row_does_not_depend_on_what_is_asked_with_it(rows_per_shard, seed, num_lanes, window_rows, data):
    order = RowOrder(rows_per_shard, seed, num_lanes, window_rows)
    row_numbers = np.array(data.draw(st.lists(st.integers(0, 5 * order.num_rows), min_size=1, max_size=20)))
    together = np.stack(order.locate(row_numbers), 1)
    alone = [
        [int(x[0]) for x in RowOrder(rows_per_shard, seed, num_lanes, window_rows).locate([g])] for g in row_numbers
    ]
    assert together.tolist() == alone


@pytest.mark.parametrize("num_replicas", range(1, 49))
def test_replicas_share_a_step_in_one_sequence(num_replicas):
    """Caught mutation: slicing by a rounded-down share, which drops the last rows."""
    order = RowOrder([100, 300], seed=3, num_lanes=10)
    whole = order.replica_rows(1234, 240, 0, 1)
    parts = [order.replica_rows(1234, 240, replica, num_replicas) for replica in range(num_replicas)]
    assert np.concatenate(parts).tolist() == whole.tolist()
    assert sorted(whole.tolist()) == list(range(1234, 1474))
    if 240 % num_replicas == 0:
        assert {len(part) for part in parts} == {240 // num_replicas}


@settings(max_examples=500, deadline=None)
@given(st.integers(1, 600), SEEDS)
def test_feistel_permutes(size, seed):
    x = np.arange(size)
    key = derive_key(seed, x * 0)
    assert sorted(permute_below(x, np.full(size, size), key).tolist()) == x.tolist()


def test_seeds_and_epochs_shuffle_differently():
    order = RowOrder([200, 300], seed=1, num_lanes=4)
    first, second = (np.stack(order.locate(np.arange(e * 500, (e + 1) * 500))[1:], 1).tolist() for e in (0, 1))
    other = np.stack(RowOrder([200, 300], seed=2, num_lanes=4).locate(np.arange(500))[1:], 1).tolist()
    assert first != second
    assert first != other


def test_a_shuffled_window_is_well_mixed():
    """Rank correlation between place and row within one window is that of chance: below 4 / sqrt(n)."""
    rows = RowOrder([4096], seed=5, num_lanes=1, window_rows=4096).locate(np.arange(4096))[2]
    assert abs(np.corrcoef(np.arange(4096), rows)[0, 1]) < 4 / 64
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 4 / 64


def test_a_lane_stays_on_few_shards():
    """One lane of 8 reads 1/8 of an epoch of 64 shards: 8 shards and at most one cut at each end."""
    order = RowOrder([100] * 64, seed=0, num_lanes=8, window_rows=50)
    shards = order.locate(np.arange(3, 6400, 8))[1]
    assert len(set(shards.tolist())) <= 9
