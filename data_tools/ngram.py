"""Unigram, bigram and trigram language models over token ids: what a transformer has to beat to have learnt more.

Interpolated modified Kneser-Ney with the closed-form discounts of Chen & Goodman: for a word w after a context h, seen
c(hw) times,

    P(w | h) = max(c(hw) - D(c), 0) / c(h) + gamma(h) P(w | shorter h),    gamma(h) = sum of the D taken off / c(h),

where the orders below the highest count in how many distinct contexts w was seen, and the lowest is uniform.

Source: Chen & Goodman, An Empirical Study of Smoothing Techniques for Language Modeling (1999), section 3.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from megascale.errors import DataError

_MAX_VOCAB_SIZE = 2_000_000
"""Three token ids make one int64 key: the cube of the vocabulary stays below 2^63."""


@dataclass(frozen=True)
class NgramModel:
    """Fitted models; build one by `fit_ngrams`.

    Attributes:
        vocab_size: ids are 0 .. vocab_size - 1, each with a positive probability in every context.
        unigram: the model without a context, fitted on raw counts.
        bigram: orders 1 and 2; the lower one is of Kneser-Ney counts.
        trigram: orders 1, 2 and 3, likewise.
    """

    vocab_size: int
    unigram: tuple["Order", ...]
    bigram: tuple["Order", ...]
    trigram: tuple["Order", ...]

    def probabilities(self, name: str, contexts: np.ndarray, words: np.ndarray) -> np.ndarray:
        """P(word | context) by the model `name`.

        Shape: contexts [N, at least the model's order - 1], of which the last ids count; words [N]; result [N].
        """
        probability = np.full(len(words), 1.0 / self.vocab_size)
        for length, order in enumerate(getattr(self, name)):
            context = _join(contexts[:, contexts.shape[1] - length :], self.vocab_size)
            probability = order.interpolate(context, words, self.vocab_size, probability)
        return probability

    def evaluate(self, rows: Iterable[np.ndarray]) -> dict[str, float]:
        """Mean negative log-likelihood per label token, in nats, of rows of ids, by each model.

        As for a transformer, the first id of a row is given and all others are predicted; the first of those has one id
        of context, so the trigram leaves it to the bigram.

        Raises:
            DataError: no row has two ids, or an id is outside the vocabulary.
        """
        contexts, words, has_two = _flatten(rows, self.vocab_size)
        unigram = self.probabilities("unigram", contexts, words)
        bigram = self.probabilities("bigram", contexts, words)
        trigram = np.where(has_two, self.probabilities("trigram", contexts, words), bigram)
        models = {"unigram": unigram, "bigram": bigram, "trigram": trigram}
        return {name: float(-np.log(probability).mean()) for name, probability in models.items()}


@dataclass(frozen=True)
class Order:
    """Discounted counts of one order, as sorted arrays to search in.

    Attributes:
        keys: distinct n-grams, each joined into one integer, ascending.
        masses: discounted count over the count of its context, by n-gram.
        contexts: distinct contexts, ascending.
        gammas: probability that a context leaves to the shorter one.
    """

    keys: np.ndarray
    masses: np.ndarray
    contexts: np.ndarray
    gammas: np.ndarray

    def interpolate(self, contexts: np.ndarray, words: np.ndarray, vocab_size: int, lower: np.ndarray) -> np.ndarray:
        """Adds this order to the probabilities of the order below; an unseen context leaves them as they are."""
        mass = _look_up(self.keys, self.masses, contexts * vocab_size + words, missing=0.0)
        gamma = _look_up(self.contexts, self.gammas, contexts, missing=1.0)
        return mass + gamma * lower


def fit_ngrams(rows: Iterable[np.ndarray], vocab_size: int) -> NgramModel:
    """Fits the models on rows of token ids; n-grams don't reach from one row into the next.

    Cost: time and memory of sorting one int64 per token and order; 3 million tokens take about 1 s and 250 MB.

    Raises:
        DataError: no row has two ids, an id is outside the vocabulary, or the vocabulary is too large.
    """
    if not 0 < vocab_size <= _MAX_VOCAB_SIZE:
        raise DataError(f"vocab_size = {vocab_size} is outside 1 .. {_MAX_VOCAB_SIZE}, the range of the n-gram models")
    contexts, words, has_two = _flatten(rows, vocab_size)
    bigrams = np.unique(contexts[:, 1] * vocab_size + words, return_counts=True)
    unigrams = np.unique(words, return_counts=True)
    seen_twice = has_two.nonzero()[0]
    trigrams = np.unique(_join(contexts[seen_twice], vocab_size) * vocab_size + words[seen_twice], return_counts=True)
    # In how many contexts an n-gram was seen is how often it ends one of the distinct longer n-grams.
    bigrams_of_types = np.unique(trigrams[0] % vocab_size**2, return_counts=True)
    unigrams_of_bigrams = np.unique(bigrams[0] % vocab_size, return_counts=True)
    unigrams_of_trigrams = np.unique(bigrams_of_types[0] % vocab_size, return_counts=True)

    def build(*counted) -> tuple[Order, ...]:
        return tuple(_build_order(keys, counts, vocab_size) for keys, counts in counted)

    return NgramModel(
        vocab_size=vocab_size,
        unigram=build(unigrams),
        bigram=build(unigrams_of_bigrams, bigrams),
        trigram=build(unigrams_of_trigrams, bigrams_of_types, trigrams),
    )


def derive_discounts(counts: np.ndarray) -> np.ndarray:
    """The amounts to take off a count of 0, 1, 2, and 3 or more; index by the count, at most 3.

    Where a small corpus has no n-grams of some count, the closed form has no answer and half of the count is taken,
    at most 1.5; the discount is never the whole count, nor zero, so nothing is left without probability.

    Source: Chen & Goodman 1999, equation 26.
    """
    n1, n2, n3, n4 = (int((counts == count).sum()) for count in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2) if n1 else 0.0
    discounts = [0.0]
    for count, fewer, more in ((1, n1, n2), (2, n2, n3), (3, n3, n4)):
        discount = count - (count + 1) * y * more / fewer if fewer and y else 0.0
        discounts.append(discount if 0.0 < discount < count else count / 2)
    return np.array(discounts)


def _build_order(keys: np.ndarray, counts: np.ndarray, vocab_size: int) -> Order:
    """Discounts the counts of n-grams and finds what each context leaves over. Keys are ascending and distinct."""
    discounts = derive_discounts(counts)[np.minimum(counts, 3)]
    contexts, starts = np.unique(keys // vocab_size, return_index=True)
    if not len(contexts):
        return Order(keys, counts.astype(np.float64), contexts, np.empty(0))
    totals = np.add.reduceat(counts, starts).astype(np.float64)
    taken = np.add.reduceat(discounts, starts)
    num_words = np.diff(np.append(starts, len(keys)))
    return Order(keys, (counts - discounts) / np.repeat(totals, num_words), contexts, taken / totals)


def _flatten(rows: Iterable[np.ndarray], vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All predictions in the rows: two ids of context [N, 2], the word [N], and whether both context ids are real."""
    contexts, words, has_two = [], [], []
    for row in rows:
        ids = np.asarray(row, dtype=np.int64)
        if len(ids) < 2:
            continue
        before = np.concatenate([ids[:1], ids[:-2]])
        contexts.append(np.stack([before, ids[:-1]], axis=1))
        words.append(ids[1:])
        has_two.append(np.arange(1, len(ids)) > 1)
    if not words:
        raise DataError("the n-gram models got no row of two or more token ids; use a split that has rows")
    all_contexts, all_words = np.concatenate(contexts), np.concatenate(words)
    lowest, highest = min(all_contexts.min(), all_words.min()), max(all_contexts.max(), all_words.max())
    if lowest < 0 or highest >= vocab_size:
        raise DataError(f"token ids {lowest} .. {highest} don't fit vocab_size = {vocab_size}")
    return all_contexts, all_words, np.concatenate(has_two)


def _join(contexts: np.ndarray, vocab_size: int) -> np.ndarray:
    """One integer for each context of equal length; the empty context is 0."""
    joined = np.zeros(len(contexts), dtype=np.int64)
    for column in contexts.T:
        joined = joined * vocab_size + column
    return joined


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray, missing: float) -> np.ndarray:
    """The value of each wanted key, or `missing`; keys are ascending."""
    if not len(keys):
        return np.full(len(wanted), missing)
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], missing)
