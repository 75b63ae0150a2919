"""Pairs of texts, of which a model reads the first and writes the second, such as a sentence and its translation. Pure.

A document of a corpus made by `megascale data pairs` is the source, an end-of-text token, the target, and another one.
A row is one pair. Legend: B rows, S positions of the source, T of the target.
"""

from collections.abc import Sequence

import numpy as np

from megascale.config.schema import RunConfig
from megascale.config.target import target_len
from megascale.data.manifest import Manifest
from megascale.data.objectives import PAIR_ROW, Arrays
from megascale.data.row import Row
from megascale.data.spans import blank_pairs, fill_pair
from megascale.errors import DataError


class Pairs:
    """Makes sources and targets of rows of one pair each; what is longer than its row is cut, its end kept.

    Args:
        seq_len: positions of a source.
        target_len: positions of a target.
        end_id: ends source and target, begins the decoder's input and pads all of them.
    """

    row_tokens, overlap = PAIR_ROW

    def __init__(self, seq_len: int, target_len: int, end_id: int):
        self.seq_len, self.target_len, self.end_id = seq_len, target_len, end_id

    def assemble(self, rows: Sequence[Row | None], keys_B: np.ndarray) -> Arrays:
        """Takes each pair apart; nothing is drawn, so `keys_B` isn't used.

        Raises:
            DataError: a row isn't a pair.
        """
        arrays = blank_pairs(len(rows), self.seq_len, self.target_len, self.end_id)
        for number, row in enumerate(rows):
            if row is not None:
                source, target = self.take_apart(row.tokens.astype(np.int64))
                documents = np.zeros(len(source), np.int32), np.zeros(len(target), np.int32)
                fill_pair(arrays, number, source, documents[0], target, documents[1], self.end_id)
        return arrays

    def take_apart(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source and target of a pair, each with its end."""
        ends = np.flatnonzero(tokens == self.end_id)
        if len(ends) != 2 or ends[1] != len(tokens) - 1:
            raise DataError(
                f"a document of {len(tokens)} tokens with {len(ends)} end-of-text tokens isn't a pair, which has one"
                " after its source and one after its target; make a corpus of pairs with: megascale data pairs"
            )
        source, target = tokens[: ends[0] + 1], tokens[ends[0] + 1 :]
        return cut_to(source, self.seq_len), cut_to(target, self.target_len)


def cut_to(tokens: np.ndarray, size: int) -> np.ndarray:
    """The tokens, or the first of them and the last one where they are too many."""
    return tokens if len(tokens) <= size else np.append(tokens[: size - 1], tokens[-1])


def build_pairs(config: RunConfig, manifest: Manifest) -> Pairs:
    """The objective of a run over corpora with the end-of-text token of `manifest`."""
    return Pairs(config.train.seq_len, target_len(config), manifest.eos_id)
