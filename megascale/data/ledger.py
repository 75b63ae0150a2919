"""What a run has read: counts for each corpus, and a digest of every token in its place. Pure.

The digest of a row is 40 bits of a hash of its number and of the checksum of its tokens. A step's is the sum over its
rows, in which neither the order of the rows nor the number of replicas shows; a run's chains those of its steps. Two
runs with equal digests read the same tokens in the same rows of the same steps.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Self

import numpy as np

from megascale.data.permutation import derive_key, splitmix64
from megascale.data.row import Row

ROW_DIGEST_SHIFT = 24
"""Leaves 40 bits, of which int64 holds the sum of 8 million."""
NO_DIGEST = f"{0:016x}"
"""The digest of a run that has read nothing."""


@dataclass(frozen=True)
class ReadCounts:
    """What was read of one corpus.

    Attributes:
        rows: row numbers that were the corpus's, those masked included.
        tokens: tokens that no earlier row of their epoch had: an epoch reads as many as the corpus has.
        masked_rows: rows that a damaged shard left without labels; their tokens aren't counted.
    """

    rows: int
    tokens: int
    masked_rows: int

    def __add__(self, other: "ReadCounts") -> "ReadCounts":
        return ReadCounts(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


NOTHING_READ = ReadCounts(0, 0, 0)


@dataclass(frozen=True)
class StepCounts:
    """What one step, or a part of its rows, comes to. The counts of its parts add up to those of the step.

    Attributes:
        labels: label tokens.
        digest_sum: of its rows.
        read: by corpus.
    """

    labels: int
    digest_sum: int
    read: tuple[ReadCounts, ...]

    def to_vector(self) -> list[int]:
        """As numbers that ranks add up."""
        return [self.labels, self.digest_sum, *(number for counts in self.read for number in astuple(counts))]

    @classmethod
    def from_vector(cls, vector: Sequence[int]) -> Self:
        """The counts of a `to_vector`, or of a sum of them."""
        labels, digest_sum, *numbers = vector
        return cls(labels, digest_sum, tuple(ReadCounts(*numbers[at : at + 3]) for at in range(0, len(numbers), 3)))


def count_rows(num_corpora: int, corpora: np.ndarray, row_numbers: np.ndarray, rows: Sequence[Row | None],
               labels: int) -> StepCounts:
    """The counts of some rows; None is one that was masked. Cost: a crc32 of the tokens, 2 GB/s.

    Args:
        corpora: of each row.
        labels: label tokens of all of them.
    """
    tokens = np.array([row.new_tokens if row else 0 for row in rows], np.int64)
    is_masked = np.array([row is None for row in rows], bool)
    totals = np.zeros((num_corpora, 3), np.int64)
    np.add.at(totals, corpora, np.stack([np.ones_like(tokens), tokens, is_masked], axis=1))
    return StepCounts(labels, digest_rows(row_numbers, rows), tuple(ReadCounts(*each) for each in totals.tolist()))


def digest_rows(row_numbers: np.ndarray, rows: Sequence[Row | None]) -> int:
    """The sum of the digests of some rows."""
    checksums = np.array([1 + zlib.crc32(row.tokens) if row else 0 for row in rows], np.uint64)
    return int((derive_key(row_numbers, checksums) >> np.uint64(ROW_DIGEST_SHIFT)).sum())


def chain_digest(digest: str, step_sum: int) -> str:
    """The digest of a run after one more step; 16 hexadecimal digits."""
    return f"{int(splitmix64(np.array([int(digest, 16) ^ step_sum], np.uint64))[0]):016x}"


def add_counts(
    ledger: Mapping[str, ReadCounts], names: Sequence[str], read: Sequence[ReadCounts]
) -> dict[str, ReadCounts]:
    """A run's ledger after one more step; corpora of which nothing was read yet aren't in it."""
    new = {name: counts for name, counts in zip(names, read, strict=True) if counts.rows}
    return {
        name: ledger.get(name, NOTHING_READ) + new.get(name, NOTHING_READ) for name in sorted({**ledger, **new})
    }
