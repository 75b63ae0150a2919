"""From rows of tokens to what a model is trained on: inputs, labels, and which document each position is of. Pure.

An objective says which rows it wants cut (`row_tokens`, `overlap`) and makes arrays of them, so that every kind of
model reads the same shards. Legend: B rows, T positions.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from megascale.config.bert_rules import text_tokens
from megascale.config.schema import RunConfig
from megascale.config.target import span_plan
from megascale.data.row import Row

IGNORED_LABEL = -100
"""A position without label. torch's cross-entropy ignores this value by default."""


PAIR_LABELS = (-1, -2)
"""In place of the first position's label: the two segments of a row are in order, or they aren't. Under 0, so that a
pair isn't counted as a token."""
NO_ROW = Row(np.zeros(1, np.uint16), [1], 0)
"""Stands for a row that can't be read: a token, and no label."""


class Arrays(NamedTuple):
    """What some rows are to a model.

    Attributes:
        tokens_BT: inputs, int64.
        labels_BT: what each position is to predict, int64; -100 where nothing.
        documents_BT: number of the document of each position, int32, never falling along a row; padding is a document
            of its own.
        source_BS, source_documents_BS, segments_BT, images_BCHW: see `megascale.data.batch.Batch`.
    """

    tokens_BT: np.ndarray
    labels_BT: np.ndarray
    documents_BT: np.ndarray
    source_BS: np.ndarray | None = None
    source_documents_BS: np.ndarray | None = None
    segments_BT: np.ndarray | None = None
    images_BCHW: np.ndarray | None = None


class RowObjective(Protocol):
    """What a model learns from a row of text.

    Attributes:
        row_tokens: tokens of text that a row takes at most.
        overlap: tokens that the next row of a text takes again.
        reads_partners: whether it wants `Row.partner`; no, where it says nothing.
    """

    row_tokens: int
    overlap: int

    def assemble(self, rows: Sequence[Row | None], keys_B: np.ndarray) -> Arrays:
        """Makes the arrays of some rows.

        Args:
            rows: the rows; None gives a row without labels.
            keys_B: uint64, one a row: all that is drawn at random for a row is a function of its key.
        """


def wants_partners(objective: RowObjective) -> bool:
    """Whether an objective makes pairs of rows."""
    return getattr(objective, "reads_partners", False)


class RowShape(NamedTuple):
    """How much text a row takes, see `RowObjective`."""

    row_tokens: int
    overlap: int


IMAGE_ROW = RowShape(1 << 31, 0)
"""An image is a row, whatever its bytes."""
PAIR_ROW = RowShape(1 << 30, 0)
"""A pair of texts is a row; what is too long is cut from each text by `megascale.data.pairs`."""


def row_shape(config: RunConfig) -> RowShape:
    """The rows that a run's objective wants cut."""
    if config.model.vision is not None:
        return IMAGE_ROW
    if config.objective_kind == "pairs":
        return PAIR_ROW
    if config.objective_kind == "span":
        return RowShape(span_plan(config).text, 0)
    if config.objective_kind == "mlm":
        return RowShape(text_tokens(config), 0)
    return RowShape(config.train.seq_len + 1, Causal.overlap)


class Causal:
    """Next-token prediction: each label is the token after the input.

    Args:
        seq_len: positions of a row.
        pad_id: input on positions without token.
        label_document_starts: whether the first token of a document is a label, of the last token of the one before.
            That of a resumed piece never is: it was a label where the document was cut.
    """

    overlap = 1

    def __init__(self, seq_len: int, pad_id: int, label_document_starts: bool):
        self.seq_len, self.row_tokens = seq_len, seq_len + 1
        self.pad_id, self.label_document_starts = pad_id, label_document_starts

    def assemble(self, rows: Sequence[Row | None], keys_B: np.ndarray) -> Arrays:
        """Shifts each row by one; nothing is drawn, so `keys_B` isn't used."""
        shape = len(rows), self.seq_len
        tokens_BT, labels_BT = np.empty((2, *shape), np.int64)
        numbers, ends = [], [0]
        for number, row in enumerate(rows):
            tokens, row_ends, _, resumed, *_ = row or NO_ROW
            row_ends, num_labels = row_ends[:-1], len(tokens) - 1
            tokens_BT[number, :num_labels], labels_BT[number, :num_labels] = tokens[:-1], tokens[1:]
            if resumed or not self.label_document_starts:
                masked = resumed if self.label_document_starts else range(1, 1 + len(row_ends))
                labels_BT[number, [row_ends[piece - 1] - 1 for piece in masked]] = IGNORED_LABEL
            row_ends.append(num_labels)  # the last token is a label only
            if num_labels < self.seq_len:
                tokens_BT[number, num_labels:], labels_BT[number, num_labels:] = self.pad_id, IGNORED_LABEL
                row_ends.append(self.seq_len)
            numbers += range(len(row_ends))
            first = number * self.seq_len
            ends += [first + end for end in row_ends]
        lengths = np.diff(np.array(ends))
        return Arrays(tokens_BT, labels_BT, np.repeat(np.array(numbers, np.int32), lengths).reshape(shape))
