"""The loader: every row once, the same rows for any number of replicas, resume from one integer, a thread that ends."""

import threading
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from megascale.data.loader import Loader, evaluation_batches
from megascale.data.order import RowOrder
from megascale.data.packing import IGNORED_LABEL
from megascale.data.prefetch import prefetch
from megascale.data.rows import describe_rows, open_rows, rows_read
from megascale.errors import ConfigError, DataError
from tests.support.corpus import make_corpus

SEQ_LEN = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("data") / "corpus")


def make_loader(folder, global_rows=12, micro_rows=2, replica=0, num_replicas=1, seed=1):
    rows = open_rows(folder, "train", SEQ_LEN, 97)
    order = RowOrder(rows.rows_per_shard, seed, num_lanes=8, window_rows=20)
    return Loader(rows, order, global_rows, micro_rows, replica, num_replicas)


def take(loader, row, num_steps):
    steps = loader.steps_from(row)
    taken = list(islice(steps, num_steps))
    steps.close()
    return taken


def content(steps, tensor="tokens_BT"):
    """All rows of some steps, per step, in order."""
    return [torch.cat([getattr(batch, tensor) for batch in step]).tolist() for step in steps]


def test_labels_are_the_next_tokens(folder):
    (step,) = take(make_loader(folder), 0, 1)
    assert len(step) == 6
    for batch in step:
        assert batch.tokens_BT.shape == batch.labels_BT.shape == (2, SEQ_LEN)
        assert batch.tokens_BT.dtype == batch.labels_BT.dtype == batch.row_numbers_B.dtype == torch.int64
        has_label = batch.labels_BT[:, :-1] != IGNORED_LABEL
        assert (batch.tokens_BT[:, 1:] == batch.labels_BT[:, :-1])[has_label].sum() == has_label.sum()


@pytest.mark.parametrize(("num_replicas", "micro_rows"), [(2, 3), (3, 4), (4, 1), (6, 2), (12, 1)])
def test_replicas_read_the_rows_of_one(folder, num_replicas, micro_rows):
    """Caught mutation: `replica_rows` called with replica 0 everywhere."""
    alone = take(make_loader(folder), 24, 3)
    shared = [take(make_loader(folder, 12, micro_rows, r, num_replicas), 24, 3) for r in range(num_replicas)]
    steps = [[batch for replica in shared for batch in replica[step]] for step in range(3)]
    for tensor in ("tokens_BT", "labels_BT", "row_numbers_B"):
        assert content(steps, tensor) == content(alone, tensor)


def test_resume_on_other_replicas_and_batch(folder):
    """Rows 0 .. 60 read in steps of 12 by one replica, then 12 in 12 by three, are the rows of one run."""
    whole = [row for step in content(take(make_loader(folder, global_rows=6), 0, 12), "row_numbers_B") for row in step]
    first = [row for step in content(take(make_loader(folder), 0, 5), "row_numbers_B") for row in step]
    later = [content(take(make_loader(folder, 12, 2, r, 3), 60, 1), "row_numbers_B")[0] for r in range(3)]
    assert sorted([*first, *(row for rows in later for row in rows)]) == sorted(whole) == list(range(72))


def test_an_epoch_reads_every_token_once(folder):
    """The ledger: token ranges of the rows of an epoch tile each shard, the seam token being label and then input."""
    loader = make_loader(folder)
    num_rows = loader.rows.num_rows
    for epoch in range(2):
        places = describe_rows(loader.rows, loader.order, np.arange(epoch * num_rows, (epoch + 1) * num_rows))
        assert {place.epoch for place in places} == {epoch}
        labels = Counter((p.shard_name, t) for p in places for t in range(p.start + 1, p.stop))
        assert set(labels.values()) == {1}
        assert len(labels) == loader.rows.manifest.num_tokens - len(loader.rows.manifest.shards)


def test_rows_read_are_what_the_steps_hold(folder):
    loader = make_loader(folder, global_rows=12)
    read = list(rows_read(loader.rows, loader.order, 5, 40))
    steps = take(loader, 0, 4)
    by_number = {}
    for step in steps:
        for batch in step:
            for number, tokens, labels in zip(batch.row_numbers_B, batch.tokens_BT, batch.labels_BT, strict=True):
                count = int((labels != IGNORED_LABEL).sum())
                by_number[int(number)] = [*tokens[:count].tolist(), int(labels[count - 1])]
    assert [row.tolist() for row in read] == [by_number[number] for number in range(5, 40)]


def test_fewer_rows_than_a_batch(folder):
    num_rows = open_rows(folder, "train", SEQ_LEN, 97).num_rows
    message = (
        rf"has {num_rows} rows of seq_len = 24, fewer than the 400 rows of one step; set .* to {num_rows // 2 * 48} "
    )
    with pytest.raises(DataError, match=message):
        make_loader(folder, global_rows=400)
    with pytest.raises(DataError, match=r"lower train.micro_batch_size x dp = 400"):
        make_loader(folder, global_rows=400, micro_rows=400)


def test_batch_that_does_not_divide(folder):
    with pytest.raises(ConfigError, match=r"10 rows isn't a multiple of .* = 2 x 3 = 6; use 6 or 12 rows"):
        make_loader(folder, global_rows=10, micro_rows=2, num_replicas=3)


@pytest.mark.parametrize(
    ("num_replicas", "micro_rows", "max_rows"), [(1, 4, None), (3, 4, None), (2, 5, 33), (4, 64, 3)]
)
def test_evaluation_reads_each_row_once_and_steps_equally(folder, num_replicas, micro_rows, max_rows):
    """Caught mutation: range stops at `num_rows` for every replica, which leaves later replicas a batch short."""
    rows = open_rows(folder, "validation", SEQ_LEN, 97)
    num_rows = min(rows.num_rows, max_rows or rows.num_rows)
    parts = [list(evaluation_batches(rows, micro_rows, r, num_replicas, max_rows)) for r in range(num_replicas)]
    assert len({len(part) for part in parts}) == 1
    batches = [batch for part in parts for batch in part]
    assert all(batch.tokens_BT.shape == (micro_rows, SEQ_LEN) for batch in batches)
    numbers = torch.cat([batch.row_numbers_B for batch in batches])
    assert sorted(numbers[numbers >= 0].tolist()) == list(range(num_rows))
    num_labels = sum(int((batch.labels_BT != IGNORED_LABEL).sum()) for batch in batches)
    if max_rows is None:
        assert num_labels == rows.manifest.num_tokens - len(rows.manifest.shards)
    for batch in batches:
        assert (batch.labels_BT[batch.row_numbers_B < 0] == IGNORED_LABEL).all()


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "megascale-prefetch"]


def test_the_thread_ends_with_its_consumer():
    """Caught mutation: no emptying of the queue, which leaves the thread in `put` and the consumer in `join`."""
    is_ahead = threading.Event()

    def items():
        for number in range(100):
            if number == 4:
                is_ahead.set()  # 0 and 1 are consumed, 2 and 3 fill the queue
            yield number

    made = prefetch(items(), 2)
    assert [next(made), next(made)] == [0, 1]
    assert is_ahead.wait(30)
    assert len(prefetch_threads()) == 1
    made.close()
    assert not prefetch_threads()


def test_the_loader_closes_its_thread(folder):
    steps = make_loader(folder).steps_from(0)
    next(steps)
    steps.close()
    assert not prefetch_threads()


def test_errors_of_the_thread_reach_the_consumer_in_order():
    def items():
        yield 1
        yield 2
        raise DataError("shard 7 is damaged")

    made = prefetch(items(), 1)
    assert [next(made), next(made)] == [1, 2]
    with pytest.raises(DataError, match="shard 7 is damaged"):
        next(made)
    assert not prefetch_threads()


def test_prefetch_of_an_iterator_that_ends():
    assert list(prefetch(iter(range(10)), 2)) == list(range(10))
