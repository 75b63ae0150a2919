"""The row order: exactly once per epoch, the same for any number of replicas, and the same for ever."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest

from megascale.data.mixture import PERIOD, MixtureStage
from megascale.data.order import CorpusShape, Places, RowOrder
from megascale.data.permutation import derive_key, hash_name, permute_below, splitmix64
from megascale.errors import DataError

NAMES = ("code", "math", "web")
NUM_GROUPS, CASES_PER_GROUP = 20, 500
HASH_OF_WEB = 0x7496a59a64098050
GOLDEN_CORPORA = [("code", [2, 1]), ("math", [4]), ("web", [5, 0, 9, 3])]
GOLDEN = {
    "single": ([MixtureStage(0, (1,))], 20, (
        "0w0.0 0w3.2 0w2.1 0w2.6 0w0.2 0w3.0 0w2.2 0w2.5 0w0.1 0w3.1 0w2.3 0w2.8 0w0.3 0w2.0 0w2.4 0w2.7 "
        "0w0.4 1w0.4 1w2.1 1w2.5"
    )),
    "blend": ([MixtureStage(0, (1, 2, 5))], 24, (
        "0w0.0 0m0.0 0w2.2 0c0.1 0w0.2 0w2.1 0m0.2 0w2.7 0w0.1 0m0.1 0w2.3 0c0.0 0w0.3 0w3.2 0m0.3 0w2.6 "
        "0w3.0 1m0.1 0w2.4 0c1.0 0w0.4 0w2.0 1m0.2 0w2.8"
    )),
    "stages": ([MixtureStage(0, (1, 2, 5)), MixtureStage(7, (4, 0, 4)), MixtureStage(18, (0, 7, 1))], 30, (
        "0w0.0 0m0.0 0w2.2 0c0.1 0w0.2 0w2.1 0m0.2 0w2.0 0c0.0 0w0.1 0c1.0 0w2.3 1c0.0 0w0.3 1c1.0 0w2.4 "
        "1c0.1 0w3.0 0m0.1 0m0.3 0w0.4 1m0.1 1m0.2 1m0.3 1m0.0 2m0.1 2m0.2 2m0.3 0w3.1 2m0.0"
    )),
}
"""Per order: stages, rows, and each of the rows as epoch, corpus, shard, row."""
GOLDEN_FAR = "0c641.861 0m45.215 0m239.69 0c857.336 0w1.634 4w68.362 111084c381.868"


class Case(NamedTuple):
    """An order, and how many of its rows are looked at."""

    corpora: list[CorpusShape]
    stages: list[MixtureStage]
    seed: int
    num_lanes: int
    window_rows: int
    num_rows: int

    def order(self, **changes) -> RowOrder:
        case = self._replace(**changes)
        return RowOrder(case.corpora, case.stages, case.seed, case.num_lanes, case.window_rows)


def make_case(random: np.random.Generator) -> Case:
    """A small blend of 1 to 3 corpora and 1 to 4 stages, over about an epoch of all of it, and several of some."""
    num_corpora = int(random.integers(1, 4))
    period = int(random.integers(num_corpora, 12))
    corpora = [make_corpus(random, name) for name in NAMES[:num_corpora]]
    num_rows = int(random.integers(1, int(1.5 * sum(corpus.rows_per_shard.sum() for corpus in corpora)) + 2))
    num_later = int(random.integers(4)) * int(random.integers(2))
    first_rows = sorted({0, *random.integers(1, num_rows + 1, num_later).tolist()})
    stages = [MixtureStage(first, make_counts(random, num_corpora, period)) for first in first_rows]
    num_lanes, window_rows = int(random.integers(1, 11)), int(random.integers(1, 16))
    return Case(corpora, stages, int(random.integers(2**62)), num_lanes, window_rows, num_rows)


def make_corpus(random: np.random.Generator, name: str) -> CorpusShape:
    """1 to 5 shards of 0 to 9 rows, often empty."""
    rows = np.maximum(random.integers(-3, 10, random.integers(1, 6)), 0)
    rows[0] += not rows.any()
    return CorpusShape(name, rows)


def make_counts(random: np.random.Generator, num_corpora: int, period: int) -> tuple[int, ...]:
    """Rows of each corpus in a period; often some of them 0."""
    return tuple(random.multinomial(period, random.dirichlet(np.full(num_corpora, 0.5))).tolist())


def row_ids(case: Case, places: Places, corpus: int) -> tuple[np.ndarray, np.ndarray]:
    """(epoch, number within the corpus) of the rows of a corpus, in the order of row numbers."""
    rows_per_shard, chosen = case.corpora[corpus].rows_per_shard, places.corpora == corpus
    shards, rows = places.shards[chosen], places.rows[chosen]
    assert (rows < rows_per_shard[shards]).all()
    return places.epochs[chosen], (np.cumsum(rows_per_shard) - rows_per_shard)[shards] + rows


def same(places: Places, other: Places) -> bool:
    return all(np.array_equal(ours, theirs) for ours, theirs in zip(places, other, strict=True))


def show(places: Places, names: Sequence[str]) -> str:
    """Places in a line: epoch, corpus, shard, row of each."""
    located = zip(*(array.tolist() for array in places), strict=True)
    return " ".join(f"{epoch}{names[corpus][0]}{shard}.{row}" for corpus, epoch, shard, row in located)


def blend(num_shards: int, weights: tuple[float, ...], rows: int) -> tuple[list[CorpusShape], MixtureStage]:
    """Corpora of equal shards, as many as their weights say, and the mixture that reads them evenly."""
    counts = [int(weight * PERIOD) for weight in weights]
    counts[0] += PERIOD - sum(counts)
    sizes = [max(2, int(num_shards * weight)) for weight in weights]
    corpora = [CorpusShape(name, np.full(size, rows)) for name, size in zip(NAMES, sizes, strict=False)]
    return corpora, MixtureStage(0, tuple(counts))


def test_the_hash_is_splitmix64():
    """Reference values: the first outputs of splitmix64 from state 0 and 1234567."""
    states = np.array([0, 1234567], np.uint64)
    assert splitmix64(states).tolist() == [0xE220A8397B1DCDAF, 6457827717110365317]


def test_the_hash_of_a_name_is_blake2b():
    assert hash_name("web") == HASH_OF_WEB


@pytest.mark.parametrize("case", GOLDEN, ids=GOLDEN.keys())
def test_golden_order(case):
    """Pins the order for ever: a run that resumes under another release must read the same rows."""
    stages, num_rows, expected = GOLDEN[case]
    corpora = [CorpusShape(name, np.array(rows)) for name, rows in GOLDEN_CORPORA[-len(stages[0].counts) :]]
    order = RowOrder(corpora, stages, seed=42, num_lanes=4, window_rows=3)
    assert show(order.locate(np.arange(num_rows)), [name for name, _ in GOLDEN_CORPORA[-len(corpora) :]]) == expected


def test_golden_order_far_away():
    """The same at full size: default lanes and windows, the period of real runs, row 10^12."""
    corpora, stage = blend(1500, (0.6, 0.3, 0.1), 1000)
    stages = [stage, MixtureStage(10**6 + 7, stage.counts[::-1])]
    places = RowOrder(corpora, stages, seed=7).locate([0, 1, 64, 10**6 + 6, 10**6 + 7, 2 * 10**6, 10**12])
    assert show(places, NAMES) == GOLDEN_FAR


@pytest.mark.parametrize("group", range(NUM_GROUPS))
def test_every_epoch_reads_every_row_once(group):
    """No row is repeated and none skipped in any epoch of any corpus, whatever stages come in between: 10,000 cases.

    An eighth of them are resumed: a fresh order gives the second half.

    Caught mutations: the first window not bounded by the lane's rows; no new deal at a stage; what a lane has left
    counted from its first row; owners searched for to the left; a kept epoch taken beyond its end; a stage's counts
    begun at 0; a stage that begins a row late; the end of an epoch a row early.
    """
    random = np.random.default_rng(group)
    for number in range(CASES_PER_GROUP):
        case = make_case(random)
        half = int(random.integers(case.num_rows)) if number % 8 == 0 else 0
        parts = [case.order().locate(np.arange(*part)) for part in ((0, half), (half, case.num_rows)) if part[1]]
        places = Places(*map(np.concatenate, zip(*parts, strict=True)))
        for corpus, shape in enumerate(case.corpora):
            size = int(shape.rows_per_shard.sum())
            epochs, ids = row_ids(case, places, corpus)
            assert np.array_equal(epochs, np.arange(len(ids)) // size), case
            assert len(np.unique(epochs * size + ids)) == len(ids), case


def test_full_epochs_have_every_row():
    """The periods of real runs, 64 lanes, a stage that leaves a corpus out and one that takes it up again."""
    corpora, stage = blend(40, (0.7, 0.2, 0.1), 50)
    stages = [stage, MixtureStage(777, (0, PERIOD - 1, 1)), MixtureStage(1901, (PERIOD // 2, 0, PERIOD // 2))]
    case = Case(corpora, stages, 5, 64, 32, 9000)
    places = case.order().locate(np.arange(case.num_rows))
    for corpus, shape in enumerate(corpora):
        size = int(shape.rows_per_shard.sum())
        _, ids = row_ids(case, places, corpus)
        assert len(ids) > size
        for first in range(0, len(ids) - size + 1, size):
            assert np.array_equal(np.sort(ids[first : first + size]), np.arange(size))


def test_rows_depend_on_no_later_stage():
    """200 cases: without the stages after row g, or with others there, the rows below g are the same.

    Caught mutations: lanes' shares of an epoch taken from where it really ends; a stage that begins a row late.
    """
    random = np.random.default_rng(100)
    for _ in range(200):
        case = make_case(random)
        places = case.order().locate(np.arange(case.num_rows))
        stop = int(random.integers(1, case.num_rows + 1))
        kept = [stage for stage in case.stages if stage.first_row < stop]
        other = MixtureStage(stop, make_counts(random, len(case.corpora), sum(case.stages[0].counts)))
        for stages in (kept, [*kept, other]):
            below = case.order(stages=stages).locate(np.arange(stop))
            assert same(below, Places(*(array[:stop] for array in places))), (case, stop)


def test_rows_before_counts_the_rows_below():
    """200 cases, each at five row numbers.

    Caught mutations: a lane too many counted in a part of a round of lanes; a stage's counts begun at 0.
    """
    random = np.random.default_rng(200)
    for _ in range(200):
        case = make_case(random)
        order = case.order()
        corpora = order.locate(np.arange(case.num_rows)).corpora
        for row_number in (0, case.num_rows, *random.integers(case.num_rows + 1, size=3).tolist()):
            expected = np.bincount(corpora[:row_number], minlength=len(case.corpora))
            assert order.rows_before(row_number).tolist() == expected.tolist(), (case, row_number)


def test_a_row_does_not_depend_on_what_is_asked_with_it():
    """Any rows, in any order, from an order that has seen others before.

    Caught mutation: a kept epoch taken beyond its end.
    """
    random = np.random.default_rng(300)
    for _ in range(200):
        case = make_case(random)
        order = case.order()
        whole = order.locate(np.arange(case.num_rows))
        row_numbers = random.integers(case.num_rows, size=5)
        expected = Places(*(array[row_numbers] for array in whole))
        assert same(order.locate(row_numbers), expected), case
        alone = [case.order().locate([row_number]) for row_number in row_numbers]
        assert same(Places(*map(np.concatenate, zip(*alone, strict=True))), expected), case


def test_a_batch_of_no_rows_has_no_places():
    order = make_case(np.random.default_rng(0)).order()
    assert [len(array) for array in order.locate([])] == [0, 0, 0, 0]


def test_other_corpora_do_not_shuffle_a_corpus_otherwise():
    """A corpus that the mixture gives no rows, with or without text, moves nothing.

    Caught mutation: keys by position.
    """
    (code, math, web), stages = blend(30, (0.5, 0.3, 0.2), 20)[0], [MixtureStage(0, (5, 3))]
    two = RowOrder([code, web], stages, 9, 8, 16).locate(np.arange(2000))
    for rows_per_shard in (math.rows_per_shard, np.array([0, 0])):
        corpora = [code, CorpusShape("math", rows_per_shard), web]
        three = RowOrder(corpora, [MixtureStage(0, (5, 0, 3))], 9, 8, 16).locate(np.arange(2000))
        assert same(three._replace(corpora=three.corpora // 2), two)
    renamed = RowOrder([code, web._replace(name="www")], stages, 9, 8, 16).locate(np.arange(2000))
    chosen = two.corpora == 0
    assert np.array_equal(renamed.rows[chosen], two.rows[chosen])
    assert not np.array_equal(renamed.rows[~chosen], two.rows[~chosen])


@pytest.mark.parametrize("num_replicas", range(1, 49))
def test_replicas_share_a_step_in_one_sequence(num_replicas):
    """Any number of replicas gives the same global rows. Caught mutation: slicing by a rounded-down share."""
    corpora, stage = blend(30, (0.5, 0.3, 0.2), 20)
    order = RowOrder(corpora, [stage], seed=3, num_lanes=10)
    num_rows = 5 * num_replicas
    whole = order.replica_rows(1234, num_rows, 0, 1)
    parts = [order.replica_rows(1234, num_rows, replica, num_replicas) for replica in range(num_replicas)]
    assert {len(part) for part in parts} == {5}
    assert np.concatenate(parts).tolist() == whole.tolist()
    assert sorted(whole.tolist()) == list(range(1234, 1234 + num_rows))
    located = Places(*map(np.concatenate, zip(*(order.locate(part) for part in parts), strict=True)))
    assert same(located, order.locate(whole))


@pytest.mark.parametrize("weights", [(0.6, 0.3, 0.1), (0.5, 0.5), (0.34, 0.33, 0.33), (0.75, 0.25), (0.99, 0.01)])
@pytest.mark.parametrize("num_lanes", [64, 48])
def test_any_rows_in_a_row_have_their_share_of_each_corpus(weights, num_lanes):
    """To within 2 rows, from 8 rows to 1,000, in each of two stages, so that no step is of one corpus.

    Caught mutations: all lanes begin at the same entry of the table; lanes that begin V-ths of the table apart.
    """
    corpora, stage = blend(100, weights, 100)
    later = MixtureStage(777, stage.counts[::-1])
    order = RowOrder(corpora, [stage, later], seed=1, num_lanes=num_lanes)
    read = order.locate(np.arange(4000)).corpora == np.arange(len(corpora))[:, None]
    for first, stop, counts in ((0, 777, stage.counts), (777, 4000, later.counts)):
        before = np.concatenate([np.zeros((len(corpora), 1), int), np.cumsum(read[:, first:stop], axis=1)], axis=1)
        for size in (8, 64, 100, 700, 1000):
            rows = before[:, size:] - before[:, :-size]
            assert not rows.size or np.abs(rows - size * np.array(counts)[:, None] / PERIOD).max() <= 2, size


def test_feistel_permutes():
    for size in (*range(1, 70), 255, 256, 257, 600):
        x = np.arange(size)
        assert sorted(permute_below(x, np.full(size, size), derive_key(size, x * 0)).tolist()) == x.tolist()


def test_seeds_and_epochs_shuffle_differently():
    corpora, stages = [CorpusShape("web", np.array([200, 300]))], [MixtureStage(0, (1,))]
    first, second = (RowOrder(corpora, stages, 1, 4).locate(np.arange(e * 500, (e + 1) * 500)).rows for e in (0, 1))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, RowOrder(corpora, stages, 2, 4).locate(np.arange(500)).rows)


def test_a_shuffled_window_is_well_mixed():
    """Rank correlation between place and row within one window is that of chance: below 4 / sqrt(n)."""
    rows = RowOrder([CorpusShape("web", np.array([4096]))], [MixtureStage(0, (1,))], 5, 1).locate(np.arange(4096)).rows
    assert abs(np.corrcoef(np.arange(4096), rows)[0, 1]) < 4 / 64
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 4 / 64


@pytest.mark.parametrize(("nodes", "weights", "most"), [(8, (1.0,), 1.1), (8, (0.6, 0.3, 0.1), 1.2), (32, (1.0,), 1.2)])
def test_a_node_fetches_few_shards(nodes, weights, most):
    """Fetches per shard over an epoch of 256 shards on nodes that keep what they fetched; without lanes it is `nodes`.

    Caught mutation: rows of a step not sorted by lane.
    """
    corpora, stage = blend(256, weights, 32)
    order = RowOrder(corpora, [stage], seed=5, num_lanes=64, window_rows=32)
    num_rows, fetched = sum(order.num_rows), set()
    for first_row in range(0, num_rows // 256 * 256, 256):
        places = order.locate(order.replica_rows(first_row, 256, 0, 1))
        row_nodes = np.arange(256) * nodes // 256
        fetched.update(zip(row_nodes.tolist(), places.corpora.tolist(), places.shards.tolist(), strict=True))
    assert len(fetched) / sum(len(corpus.rows_per_shard) for corpus in corpora) <= most


def test_a_corpus_without_rows_is_refused_when_it_is_read():
    corpora = [CorpusShape("code", np.array([3])), CorpusShape("web", np.array([0, 0]))]
    RowOrder(corpora, [MixtureStage(0, (4, 0))], 0)
    with pytest.raises(DataError, match="corpus 'web' has no rows"):
        RowOrder(corpora, [MixtureStage(0, (4, 0)), MixtureStage(10**9, (3, 1))], 0)
