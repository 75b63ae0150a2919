"""One row of text, as it was read."""

from typing import NamedTuple

import numpy as np


class Picture(NamedTuple):
    """An image as it was decoded, before anything is drawn for it.

    Attributes:
        pixels_HWC: uint8, height x width x colours.
        label: its class.
    """

    pixels_HWC: np.ndarray
    label: int


class Row(NamedTuple):
    """What one row number reads.

    Attributes:
        tokens: of the row, uint16 or uint32; not to be written to.
        ends: where its pieces end within `tokens`; the last is their number.
        new_tokens: tokens that no earlier row has read: over the rows of an epoch, the tokens of the split.
        resumed: the pieces, by their number from 1 on, that go on with a document begun in another row. Their first
            token is a label there, and after another document nothing tells it.
        picture: of an image corpus, whose tokens are the bytes of the sample; None for text.
        partner: tokens of another row, for objectives that make pairs of rows; None for the others.
    """

    tokens: np.ndarray
    ends: list[int]
    new_tokens: int
    resumed: tuple[int, ...] = ()
    picture: Picture | None = None
    partner: np.ndarray | None = None


class PiecePlace(NamedTuple):
    """Where a piece comes from: tokens [start, stop) of a shard, of a document of one of its blocks."""

    block: int
    document: int
    start: int
    stop: int
