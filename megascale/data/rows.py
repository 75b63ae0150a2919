"""A split as rows of seq_len + 1 tokens, and what a run reads of it. Without torch, for tools and tests."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megascale.data.manifest import Manifest, check_corpus, load_manifest
from megascale.data.order import RowOrder
from megascale.data.packing import count_rows, row_token_range
from megascale.data.shards import ShardStore
from megascale.errors import ConfigError, DataError

ROWS_AT_ONCE = 1024
"""Rows that `rows_read` locates in one call, which spreads its fixed cost."""


class RowPlace(NamedTuple):
    """Where the tokens of a row come from: tokens [start, stop) of a shard, read in an epoch."""

    epoch: int
    shard_name: str
    row: int
    start: int
    stop: int


class CorpusRows:
    """The rows of a split at one sequence length, in the order of the shards.

    Args:
        manifest: the split.
        seq_len: input tokens of a row.

    Raises:
        DataError: no shard is long enough for a row.
    """

    def __init__(self, manifest: Manifest, seq_len: int):
        self.manifest, self.seq_len = manifest, seq_len
        self.rows_per_shard = np.array([count_rows(shard.tokens, seq_len) for shard in manifest.shards])
        self.num_rows = int(self.rows_per_shard.sum())
        self._first_rows = np.cumsum(self.rows_per_shard) - self.rows_per_shard
        self._store = ShardStore(manifest)
        if self.num_rows == 0:
            raise DataError(
                f"{manifest.index_path} has {manifest.num_tokens} tokens in {len(manifest.shards)} shards: no row of "
                f"two tokens or more; build the corpus from more text"
            )

    def token_range(self, shard: int, row: int) -> tuple[int, int]:
        """The tokens [start, stop) of the shard that a row reads."""
        return row_token_range(row, self.seq_len, self.manifest.shards[shard].tokens)

    def read(self, shard: int, row: int) -> np.ndarray:
        """The tokens of a row: seq_len + 1 of them, fewer in the last row of a shard. Not to be written to."""
        return self._store.open(shard).read(*self.token_range(shard, row))

    def locate_unshuffled(self, number: int) -> tuple[int, int]:
        """(shard, row within the shard) of a row in the order of the shards."""
        shard = int(np.searchsorted(self._first_rows, number, "right")) - 1
        return shard, number - int(self._first_rows[shard])


def open_rows(folder: str | Path, split: str, seq_len: int, vocab_size: int) -> CorpusRows:
    """Opens a split after the checks that cost no reading of tokens; see `load_manifest` and `check_corpus`."""
    manifest = load_manifest(folder, split)
    check_corpus(manifest, vocab_size)
    return CorpusRows(manifest, seq_len)


def read_rows(rows: CorpusRows, order: RowOrder, row_numbers: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    """The tokens of rows of a run, by row number: seq_len + 1 each, fewer at a shard's end. Not to be written to."""
    _, shards, places = order.locate(row_numbers)
    return [rows.read(shard, row) for shard, row in zip(shards.tolist(), places.tolist(), strict=True)]


def rows_read(rows: CorpusRows, order: RowOrder, first: int, stop: int) -> Iterator[np.ndarray]:
    """Yields the tokens of the rows [first, stop) that all replicas of a run together read, by row number."""
    for begin in range(first, stop, ROWS_AT_ONCE):
        yield from read_rows(rows, order, np.arange(begin, min(begin + ROWS_AT_ONCE, stop)))


def describe_rows(rows: CorpusRows, order: RowOrder, row_numbers: Sequence[int] | np.ndarray) -> list[RowPlace]:
    """Where rows of a run come from, for ledgers and people."""
    located = zip(*(array.tolist() for array in order.locate(row_numbers)), strict=True)
    return [
        RowPlace(epoch, rows.manifest.shards[shard].name, row, *rows.token_range(shard, row))
        for epoch, shard, row in located
    ]


def check_batch(rows: CorpusRows, global_rows: int, micro_rows: int, num_replicas: int) -> None:
    """Refuses a step that can't be dealt out evenly or that the corpus can't fill."""
    unit = micro_rows * num_replicas
    if global_rows < 1 or global_rows % unit:
        legal = sorted({max(unit, global_rows // unit * unit), (global_rows // unit + 1) * unit})
        raise ConfigError(
            f"a step of {global_rows} rows isn't a multiple of train.micro_batch_size x dp = {micro_rows} x "
            f"{num_replicas} = {unit}; use {' or '.join(map(str, legal))} rows"
        )
    if rows.num_rows < global_rows:
        fitting = rows.num_rows // unit * unit
        remedy = (
            f"set train.global_batch_tokens to {fitting * rows.seq_len} or less"
            if fitting
            else f"lower train.micro_batch_size x dp = {unit}"
        )
        raise DataError(
            f"{rows.manifest.index_path} has {rows.num_rows} rows of seq_len = {rows.seq_len}, fewer than the "
            f"{global_rows} rows of one step; {remedy}, shorten train.seq_len, or build the corpus from more text"
        )
