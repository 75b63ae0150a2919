"""One row of text, as it was read."""

from typing import NamedTuple

import numpy as np


class Row(NamedTuple):
    """What one row number reads.

    Attributes:
        tokens: of the row, uint16 or uint32; not to be written to.
        ends: where its pieces end within `tokens`; the last is their number.
        new_tokens: tokens that no earlier row has read: over the rows of an epoch, the tokens of the split.
        resumed: the pieces, by their number from 1 on, that go on with a document begun in another row. Their first
            token is a label there, and after another document nothing tells it.
    """

    tokens: np.ndarray
    ends: list[int]
    new_tokens: int
    resumed: tuple[int, ...] = ()


class PiecePlace(NamedTuple):
    """Where a piece comes from: tokens [start, stop) of a shard, of a document of one of its blocks."""

    block: int
    document: int
    start: int
    stop: int
