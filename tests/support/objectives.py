"""Two objectives beside next-token prediction, small: they show that the hook serves models of other kinds."""

from collections.abc import Sequence

import numpy as np

from megascale.data.objectives import IGNORED_LABEL, Arrays
from megascale.data.permutation import derive_key
from megascale.data.row import Row


def chances(key: int, count: int) -> np.ndarray:
    """Numbers in [0, 1) of a row's key."""
    return (derive_key(key, np.arange(count)) >> np.uint64(11)) * 2.0**-53


def number_positions(ends: np.ndarray, seq_len: int) -> np.ndarray:
    """The document of each position; padding is one more."""
    bounds = np.append(ends, seq_len)
    return np.repeat(np.arange(len(bounds), dtype=np.int32), np.diff(bounds, prepend=0))


class Masked:
    """Masked-language modelling in BERT's manner (Devlin et al. 2019, arXiv 1810.04805): a label where a token is
    hidden. Rows don't overlap, since no token is a label alone.
    """

    overlap = 0

    def __init__(self, seq_len: int, pad_id: int, mask_id: int, fraction: float):
        self.row_tokens = self.seq_len = seq_len
        self.pad_id, self.mask_id, self.fraction = pad_id, mask_id, fraction

    def assemble(self, rows: Sequence[Row | None], keys_B: np.ndarray) -> Arrays:
        """Hides tokens of each row."""
        shape = len(rows), self.seq_len
        arrays = Arrays(np.full(shape, self.pad_id), np.full(shape, IGNORED_LABEL), np.zeros(shape, np.int32))
        for tokens_T, labels_T, documents_T, row, key in zip(*arrays[:3], rows, keys_B.tolist(), strict=True):
            if row is None:
                continue
            size = len(row.tokens)
            is_hidden_T = chances(key, size) < self.fraction
            tokens_T[:size] = np.where(is_hidden_T, self.mask_id, row.tokens)
            labels_T[:size][is_hidden_T] = row.tokens[is_hidden_T]
            documents_T[:] = number_positions(row.ends, self.seq_len)
        return arrays


class SpanCorruption:
    """Span corruption in T5's manner (Raffel et al. 2020, arXiv 1910.10683), laid out for a model with one stack: the
    text with a sentinel for each span, then each sentinel with its span, which alone have labels.

    A row of text grows by two sentinels a span, so it takes fewer tokens than there are positions.
    """

    overlap = 0

    def __init__(self, seq_len: int, pad_id: int, first_sentinel_id: int, num_spans: int, span_tokens: int):
        self.seq_len, self.row_tokens = seq_len, seq_len - 2 * num_spans + 1
        self.pad_id, self.first_sentinel_id = pad_id, first_sentinel_id
        self.num_spans, self.span_tokens = num_spans, span_tokens

    def assemble(self, rows: Sequence[Row | None], keys_B: np.ndarray) -> Arrays:
        """Moves spans of each row behind its text."""
        shape = len(rows), self.seq_len
        arrays = Arrays(np.full(shape, self.pad_id), np.full(shape, IGNORED_LABEL), np.zeros(shape, np.int32))
        for tokens_T, labels_T, documents_T, row, key in zip(*arrays[:3], rows, keys_B.tolist(), strict=True):
            if row is None:
                continue
            text, targets = self.split(row.tokens.tolist(), key)
            both = [*text, *targets]
            tokens_T[: len(both) - 1] = both[:-1]
            labels_T[len(text) - 1 : len(both) - 1] = targets
            documents_T[len(both) - 1 :] = 1  # text and targets of a row see each other: one document
        return arrays

    def split(self, tokens: list[int], key: int) -> tuple[list[int], list[int]]:
        """(text, targets) of a row."""
        text, targets, stretch = [], [], len(tokens) // self.num_spans
        for number, chance in enumerate(chances(key, self.num_spans).tolist()):
            sentinel, begin = self.first_sentinel_id + number, number * stretch
            end = len(tokens) if number == self.num_spans - 1 else begin + stretch
            start = begin + int(chance * (max(0, end - begin - self.span_tokens) + 1))
            stop = min(start + self.span_tokens, end)
            text += [*tokens[begin:start], sentinel, *tokens[stop:end]]
            targets += [sentinel, *tokens[start:stop]]
        return text, targets
