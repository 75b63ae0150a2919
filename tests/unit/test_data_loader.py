"""The loader: every row once, the same rows for any number of replicas, resume from one integer, a thread that ends."""

import shutil
import threading
from itertools import islice

import numpy as np
import pytest
import torch

from megascale.config.batch_plan import BatchPlan, constant_batch
from megascale.data.ledger import StepCounts
from megascale.data.loader import HINT_STEPS, Loader, evaluation_batches
from megascale.data.objectives import IGNORED_LABEL, Causal
from megascale.data.prefetch import Prefetched
from megascale.data.stream import open_validation
from megascale.errors import ConfigError, DataError
from tests.support.corpus import make_corpus
from tests.support.streams import open_test_stream, stream_config

SEQ_LEN = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("data") / "corpus")


def make_loader(folder, batches=12, micro_rows=2, replica=0, num_replicas=1, **data):
    plan = constant_batch(batches) if isinstance(batches, int) else batches
    return Loader(open_test_stream(stream_config(folder, data=data)), plan, micro_rows, replica, num_replicas)


def take(loader, step, num_steps):
    steps = loader.steps_from(step)
    taken = list(islice(steps, num_steps))
    steps.close()
    return taken


def content(batches, tensor="tokens_BT"):
    """All rows of some micro-batches, in order."""
    return torch.cat([getattr(batch, tensor) for batch in batches]).tolist()


def contents(steps, tensor="tokens_BT"):
    return [content(step.micro_batches, tensor) for step in steps]


def test_labels_are_the_next_tokens(folder):
    (step,) = take(make_loader(folder), 0, 1)
    assert len(step.micro_batches) == 6
    for batch in step.micro_batches:
        assert batch.tokens_BT.shape == batch.labels_BT.shape == batch.documents_BT.shape == (2, SEQ_LEN)
        assert batch.tokens_BT.dtype == batch.labels_BT.dtype == batch.row_numbers_B.dtype == torch.int64
        assert batch.documents_BT.dtype == torch.int32
        has_label = batch.labels_BT[:, :-1] != IGNORED_LABEL
        assert (batch.tokens_BT[:, 1:] == batch.labels_BT[:, :-1])[has_label].sum() == has_label.sum()


@pytest.mark.parametrize(("num_replicas", "micro_rows"), [(2, 3), (3, 4), (4, 1), (6, 2), (12, 1)])
def test_replicas_read_the_rows_of_one(folder, num_replicas, micro_rows):
    """Their counts and digests add up too.

    Caught mutations: `replica_rows` called with replica 0 everywhere; the digest of rows hashed one after the other.
    """
    alone = take(make_loader(folder), 2, 3)
    shared = [take(make_loader(folder, 12, micro_rows, r, num_replicas), 2, 3) for r in range(num_replicas)]
    for step, expected in enumerate(alone):
        batches = [batch for replica in shared for batch in replica[step].micro_batches]
        for tensor in ("tokens_BT", "labels_BT", "documents_BT", "row_numbers_B"):
            assert content(batches, tensor) == content(expected.micro_batches, tensor)
        vectors = [replica[step].counts.to_vector() for replica in shared]
        assert StepCounts.from_vector(np.sum(vectors, axis=0).tolist()) == expected.counts
        assert expected.counts.labels == sum(int((batch.labels_BT >= 0).sum()) for batch in batches)


def test_resume_on_other_replicas_and_batch(folder):
    """Rows 0 .. 60 read in steps of 12 by one replica, then 12 in 12 by three, are the rows of one run."""
    whole = [row for step in contents(take(make_loader(folder, 6), 0, 12), "row_numbers_B") for row in step]
    first = [row for step in contents(take(make_loader(folder), 0, 5), "row_numbers_B") for row in step]
    later = [contents(take(make_loader(folder, 12, 2, r, 3), 5, 1), "row_numbers_B")[0] for r in range(3)]
    assert sorted([*first, *(row for rows in later for row in rows)]) == sorted(whole) == list(range(72))


def test_a_batch_that_grows_reads_the_same_rows(folder):
    """Steps of 4, 4, 8, 12, 12 rows, begun anew in each of them.

    Caught mutation: `first_row` as the step times its rows.
    """
    ramp = BatchPlan((0, 2, 3), (4, 8, 12))
    numbers = [sorted(step) for step in contents(take(make_loader(folder, ramp, 2, 0, 1), 0, 5), "row_numbers_B")]
    assert [len(step) for step in numbers] == [4, 4, 8, 12, 12]
    assert [number for step in numbers for number in step] == list(range(40))
    for step in range(5):
        assert sorted(contents(take(make_loader(folder, ramp), step, 1), "row_numbers_B")[0]) == numbers[step]


@pytest.mark.parametrize("packing", ["concat", "bestfit", "none"])
def test_an_epoch_reads_every_token_once(folder, packing):
    """The ledger of any whole epoch is the corpus, to the token; each of its places is read once."""
    stream = open_test_stream(stream_config(folder, data={"packing": packing}))
    (corpus,) = stream.corpora
    for epoch in range(2):
        row_numbers = np.arange(epoch * corpus.num_rows, (epoch + 1) * corpus.num_rows)
        read = stream.read(row_numbers)
        assert set(read.places.epochs.tolist()) == {epoch}
        assert sum(row.new_tokens for row in read.rows) == corpus.manifest.num_tokens
        assert len(set(zip(read.places.shards.tolist(), read.places.rows.tolist(), strict=True))) == len(row_numbers)


def test_the_stream_reads_what_the_steps_hold(folder):
    loader = make_loader(folder)
    read, by_number = loader.stream.read(range(5, 40)).rows, {}
    for step in take(loader, 0, 4):
        for batch in step.micro_batches:
            for number, tokens, labels in zip(batch.row_numbers_B, batch.tokens_BT, batch.labels_BT, strict=True):
                count = int((labels != IGNORED_LABEL).sum())
                by_number[int(number)] = [*tokens[:count].tolist(), int(labels[count - 1])]
    assert [row.tokens.tolist() for row in read] == [by_number[number] for number in range(5, 40)]


@pytest.fixture
def damaged(folder, tmp_path):
    """The corpus without its second shard."""
    copy = shutil.copytree(folder, tmp_path / "damaged")
    (copy / "train" / "shard-000001.tar").unlink()
    return copy


def test_a_bad_shard_is_an_error_or_masked_in_place(folder, damaged):
    """Masking leaves every other row where it was. Caught mutations: masked rows left out of the batch; their tokens
    counted as read; the digest of a masked row that of an unmasked one."""
    good = take(make_loader(folder), 0, 4)
    masked = take(make_loader(damaged, on_bad_shard="mask"), 0, 4)
    assert contents(good, "row_numbers_B") == contents(masked, "row_numbers_B")
    lost = {number for step in masked for fault in step.faults for number in fault.rows}
    assert lost
    for step, expected in zip(masked, good, strict=True):
        for fault in step.faults:
            assert "shard-000001.tar" in fault.shard
            assert "shard-000001.tar" in fault.reason
        (read,), (whole,) = step.counts.read, expected.counts.read
        assert (read.rows, read.masked_rows) == (12, sum(len(fault.rows) for fault in step.faults))
        assert (read.tokens < whole.tokens) == bool(step.faults)
        assert (step.counts.digest_sum != expected.counts.digest_sum) == bool(step.faults)
        for batch, other in zip(step.micro_batches, expected.micro_batches, strict=True):
            for row, number in enumerate(batch.row_numbers_B.tolist()):
                if number in lost:
                    assert (batch.labels_BT[row] == IGNORED_LABEL).all()
                else:
                    assert torch.equal(batch.tokens_BT[row], other.tokens_BT[row])
    with pytest.raises(DataError, match=r"shard .*shard-000001\.tar"):
        take(make_loader(damaged), 0, 4)


class NotingStore:
    """A store that notes what it is told and asked."""

    def __init__(self, store):
        self.store, self.told, self.opened = store, [], []

    def open(self, shard):
        self.opened.append(shard)
        return self.store.open(shard)

    def prefetch(self, shards):
        self.told.append((len(self.opened), list(shards)))


def test_remote_stores_are_told_what_comes(folder, monkeypatch):
    """In the order of first use, before the use. Caught mutation: the shards sorted by number."""
    monkeypatch.setattr("megascale.data.loader.is_local", lambda place: False)
    loader = make_loader(folder)
    (corpus,) = loader.stream.corpora
    corpus.store = NotingStore(corpus.store)
    take(loader, 3, 1)
    first_opened, shards = corpus.store.told[0]
    ahead = [loader.stream.order.locate(loader.row_numbers(3 + step)).shards for step in range(HINT_STEPS)]
    assert (first_opened, shards) == (0, list(dict.fromkeys(np.concatenate(ahead).tolist())))
    assert list(dict.fromkeys(corpus.store.opened))[:2] == shards[:2]


def test_fewer_rows_than_a_batch(folder):
    num_rows = open_test_stream(stream_config(folder)).corpora[0].num_rows
    with pytest.raises(DataError, match=rf"{num_rows} rows of seq_len = 24, fewer than the 400 rows of one step"):
        make_loader(folder, 400)


def test_batch_that_does_not_divide(folder):
    with pytest.raises(ConfigError, match=r"10 rows isn't a multiple of .* = 2 x 3 = 6; use 6 or 12 rows"):
        make_loader(folder, BatchPlan((0, 4), (10, 12)), micro_rows=2, num_replicas=3)


@pytest.mark.parametrize(
    ("num_replicas", "micro_rows", "max_rows"), [(1, 4, None), (3, 4, None), (2, 5, 33), (4, 64, 3)]
)
def test_evaluation_reads_each_row_once_and_steps_equally(folder, num_replicas, micro_rows, max_rows):
    """Caught mutation: range stops at `num_rows` for every replica, which leaves later replicas a batch short."""
    (corpus,), objective = open_validation(stream_config(folder)), Causal(SEQ_LEN, 0, label_document_starts=True)
    num_rows = min(corpus.num_rows, max_rows or corpus.num_rows)
    parts = [list(evaluation_batches(corpus, objective, micro_rows, r, num_replicas, max_rows))
             for r in range(num_replicas)]
    assert len({len(part) for part in parts}) == 1
    batches = [batch for part in parts for batch in part]
    assert all(batch.tokens_BT.shape == (micro_rows, SEQ_LEN) for batch in batches)
    numbers = torch.cat([batch.row_numbers_B for batch in batches])
    assert sorted(numbers[numbers >= 0].tolist()) == list(range(num_rows))
    num_labels = sum(int((batch.labels_BT != IGNORED_LABEL).sum()) for batch in batches)
    if max_rows is None:
        assert num_labels == corpus.manifest.num_tokens - corpus.manifest.num_shards
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

    made = Prefetched(items(), 2)
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

    made = Prefetched(items(), 1)
    assert [next(made), next(made)] == [1, 2]
    with pytest.raises(DataError, match="shard 7 is damaged"):
        next(made)
    assert not prefetch_threads()


def test_prefetch_of_an_iterator_that_ends():
    assert list(Prefetched(iter(range(10)), 2)) == list(range(10))
