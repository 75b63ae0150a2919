"""How the documents of a shard become rows: pure functions of their lengths. Rows never cross shards, so a damaged
shard touches its own rows only.

- `concat`: documents end to end, cut every row. Needs no document ends to plan.
- `bestfit`: documents longer than a row are cut into full rows and a rest; whole documents and rests are fitted into
  rows best-fit-decreasing: the longest first, each into the row with the least space that has room for it.
- `none`: one piece a row.

Source: best-fit packing of documents is from Ding et al. 2024 (arXiv 2404.10830).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np

from megascale.data.bestfit import fit_best
from megascale.data.permutation import splitmix64
from megascale.errors import ConfigError


@dataclass(frozen=True)
class Packing:
    """How documents become rows.

    Attributes:
        kind: `concat`, `bestfit` or `none`.
        row_tokens: tokens of text that a row takes at most: seq_len + 1 for next-token prediction.
        overlap: tokens that the next row of a text takes again; 1: its first input is the last row's last label.
        spare: tokens kept free for each piece; 3 for the tokens that fill-in-the-middle puts in.

    Raises:
        ConfigError: a row without room for text.
    """

    kind: Literal["concat", "bestfit", "none"]
    row_tokens: int
    overlap: int = 1
    spare: int = 0

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise ConfigError(
                f"rows of {self.row_tokens} tokens, {self.overlap} of them the last row's and {self.spare} kept free, "
                f"have no room for text; use a train.seq_len of {self.spare + 1} or more"
            )

    @property
    def piece_tokens(self) -> int:
        """Tokens of the longest piece."""
        return self.row_tokens - self.spare

    @property
    def stride(self) -> int:
        """Tokens from the start of a full piece to that of the next one of the same text."""
        return self.piece_tokens - self.overlap


class PlannedRow(NamedTuple):
    """What a row reads.

    Attributes:
        ranges: the tokens [start, stop) of the shard, in their order in the row.
        new_tokens: how many of them no earlier row has read; over all rows these are the tokens of the shard.
        resumed: the ranges, by their number from 1 on, that go on with a document begun in another row.
    """

    ranges: list[tuple[int, int]]
    new_tokens: int
    resumed: tuple[int, ...] = ()


class Plan(Protocol):
    """The rows of one shard."""

    num_rows: int

    def row(self, number: int) -> PlannedRow:
        """What a row reads."""


class ConcatPlan:
    """Rows of documents end to end: row q covers the tokens [q S, q S + R), with S = R - overlap.

    With an overlap of 1 each token of a shard but its first is a label once and only once.

    Args:
        num_tokens: of the shard.
        packing: how its documents become rows.
    """

    def __init__(self, num_tokens: int, packing: Packing):
        self.num_rows = int(count_concat_rows(np.array(num_tokens), packing))
        self._num_tokens, self._overlap = num_tokens, packing.overlap
        self._row_tokens, self._stride = packing.row_tokens, packing.stride

    def row(self, number: int) -> PlannedRow:
        """The one range of a row; new are all tokens of the first row, of the others those beyond the overlap."""
        start = number * self._stride
        stop = min(start + self._row_tokens, self._num_tokens)
        return PlannedRow([(start, stop)], stop - start - (self._overlap if number else 0))


def count_concat_rows(num_tokens: np.ndarray, packing: Packing) -> np.ndarray:
    """Rows of `concat` of shards of so many tokens, elementwise.

    Every row reads a token that is new, so with an overlap of 1 it has a label; only a shard of a single token has a
    row without one, since each token is read.
    """
    return np.where(num_tokens > 0, np.maximum(1, -(-(num_tokens - packing.overlap) // packing.stride)), 0)


class PiecePlan:
    """Rows of pieces: whole documents, and parts of those longer than a row.

    Args:
        pieces: of all rows, row after row.
        bounds: where the pieces of each row begin; one more than rows.
        overlap: tokens of a resumed piece that the row before it read too.
    """

    def __init__(self, pieces: "Pieces", bounds: np.ndarray, overlap: int):
        self._pieces, self._bounds, self._overlap = pieces, bounds, overlap
        self.num_rows = len(bounds) - 1

    def row(self, number: int) -> PlannedRow:
        """The ranges of a row's pieces, in the order of the shard."""
        part = slice(self._bounds[number], self._bounds[number + 1])
        starts, stops, is_resumed = (array[part].tolist() for array in self._pieces)
        new_tokens = sum(stops) - sum(starts) - self._overlap * sum(is_resumed)
        resumed = tuple(piece for piece, flag in enumerate(is_resumed) if flag and piece)
        return PlannedRow(list(zip(starts, stops, strict=True)), new_tokens, resumed)


class Pieces(NamedTuple):
    """Parts of documents, one element each: tokens [start, stop) of the shard, and whether an earlier part precedes."""

    starts: np.ndarray
    stops: np.ndarray
    is_resumed: np.ndarray


def plan_pieces(document_ends: np.ndarray, packing: Packing) -> PiecePlan:
    """The rows of a shard in which documents end at these tokens.

    The fit gives rows from the longest pieces to the shortest. They are shuffled by a fixed hash, so that no stretch of
    a shard has the long documents; the pieces of a row stand in the order of the shard.

    Cost: about 1 us a document.
    """
    pieces = cut_documents(document_ends, packing)
    if packing.kind == "none":
        return PiecePlan(pieces, np.arange(len(pieces.starts) + 1), packing.overlap)
    sizes = pieces.stops - pieces.starts + packing.spare
    hashes = splitmix64(fit_best(sizes, packing.row_tokens).astype(np.uint64))
    by_row, num_pieces = np.argsort(hashes, kind="stable"), np.unique(hashes, return_counts=True)[1]
    bounds = np.concatenate([[0], np.cumsum(num_pieces)])
    return PiecePlan(Pieces(*(array[by_row] for array in pieces)), bounds, packing.overlap)


def cut_documents(document_ends: np.ndarray, packing: Packing) -> Pieces:
    """Cuts documents that are longer than a piece; the pieces are in the order of the shard."""
    lengths = np.diff(document_ends, prepend=0)
    num_pieces = np.maximum(1, -(-(lengths - packing.overlap) // packing.stride))
    within = np.arange(num_pieces.sum()) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    starts = np.repeat(document_ends - lengths, num_pieces) + within * packing.stride
    stops = np.minimum(starts + packing.piece_tokens, np.repeat(document_ends, num_pieces))
    return Pieces(starts, stops, within > 0)
