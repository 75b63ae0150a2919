"""The n-gram baselines against a direct, slow implementation, and as probabilities."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.ngram import derive_discounts, fit_ngrams
from megascale.errors import DataError

VOCAB_SIZE = 7
rows_strategy = st.lists(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=2, max_size=30), min_size=1, max_size=8)


def slow_probability(counts_by_order: list[Counter], context: tuple, word: int) -> float:
    """Interpolated Kneser-Ney straight from the definition: dictionaries of n-gram tuples, lowest order first."""
    probability = 1 / VOCAB_SIZE
    for length, counts in enumerate(counts_by_order):
        history = context[len(context) - length :]
        discounts = derive_discounts(np.array(list(counts.values()), dtype=np.int64))
        followers = {gram: count for gram, count in counts.items() if gram[:-1] == history}
        total = sum(followers.values())
        if not total:
            continue
        own = followers.get((*history, word), 0)
        kept = own - discounts[min(own, 3)]
        taken = sum(discounts[min(count, 3)] for count in followers.values())
        probability = kept / total + taken / total * probability
    return probability


def slow_counts(rows: list[list[int]]) -> dict[str, list[Counter]]:
    grams = {n: Counter() for n in (1, 2, 3)}
    for row in rows:
        for place in range(1, len(row)):
            for n in (1, 2, 3):
                if place - n + 1 >= 0:
                    grams[n][tuple(row[place - n + 1 : place + 1])] += 1

    def distinct_left(longer: Counter) -> Counter:
        seen = defaultdict(set)
        for gram in longer:
            seen[gram[1:]].add(gram[0])
        return Counter({gram: len(lefts) for gram, lefts in seen.items()})

    middle = distinct_left(grams[3])
    return {
        "unigram": [grams[1]],
        "bigram": [distinct_left(grams[2]), grams[2]],
        "trigram": [distinct_left(middle), middle, grams[3]],
    }


@settings(deadline=None, max_examples=60)
@given(rows_strategy, rows_strategy)
def test_equals_the_slow_implementation(train, held_out):
    """Mutations caught: raw lower counts instead of Kneser-Ney's, n-grams across rows, a trigram for a first label."""
    counts = slow_counts(train)
    expected = {name: [] for name in counts}
    for row in held_out:
        for place in range(1, len(row)):
            for name, length in (("unigram", 0), ("bigram", 1), ("trigram", 2)):
                model = "bigram" if name == "trigram" and place == 1 else name
                context = tuple(row[max(0, place - length) : place])
                expected[name].append(-math.log(slow_probability(counts[model], context, row[place])))
    found = fit_ngrams(map(np.array, train), VOCAB_SIZE).evaluate(map(np.array, held_out))
    assert found == pytest.approx({name: np.mean(losses) for name, losses in expected.items()}, rel=1e-9)


@settings(deadline=None, max_examples=60)
@given(rows_strategy, st.integers(0, VOCAB_SIZE - 1), st.integers(0, VOCAB_SIZE - 1))
def test_probabilities_are_positive_and_sum_to_one(train, first, second):
    model = fit_ngrams(map(np.array, train), VOCAB_SIZE)
    contexts = np.tile([first, second], (VOCAB_SIZE, 1))
    for name in ("unigram", "bigram", "trigram"):
        probabilities = model.probabilities(name, contexts, np.arange(VOCAB_SIZE))
        assert (probabilities > 0).all()
        assert probabilities.sum() == pytest.approx(1.0, rel=1e-12)


def test_learns_the_order_of_its_source():
    """A chain of order two: the trigram gets near its entropy, log 2; the bigram can't see it, nor the unigram."""
    generator = np.random.default_rng(0)
    ids = [0, 1]
    for coin in generator.integers(0, 2, 60_000):
        ids.append((3 * ids[-1] + 5 * ids[-2] + 7 * int(coin)) % 20)
    rows = np.array(ids[:60_000]).reshape(-1, 100)
    losses = fit_ngrams(rows[:500], 20).evaluate(rows[500:])
    assert losses["trigram"] == pytest.approx(math.log(2), abs=0.08)
    assert losses["bigram"] > losses["trigram"] + 0.5


def test_ids_may_be_small_unsigned_integers():
    rows = np.array([[40_000, 50_000, 60_000] * 5], dtype=np.uint16)
    assert fit_ngrams(rows, 65_536).evaluate(rows) == fit_ngrams(rows.astype(np.int64), 65_536).evaluate(rows)


@pytest.mark.parametrize(
    ("rows", "vocab_size", "message"),
    [
        ([], 8, "no row"),
        ([[3]], 8, "no row"),
        ([[1, 8]], 8, "1 .. 8 don't fit vocab_size = 8"),
        ([[-1, 2]], 8, "-1 .. 2 don't fit"),
        ([[1, 2]], 3_000_000, "vocab_size = 3000000"),
    ],
)
def test_bad_rows_are_refused(rows, vocab_size, message):
    with pytest.raises(DataError, match=message.replace(".", r"\.")):
        fit_ngrams(map(np.array, rows), vocab_size)
