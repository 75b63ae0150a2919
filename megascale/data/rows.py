"""A split as rows of seq_len + 1 tokens."""

from pathlib import Path

import numpy as np

from megascale.data.manifest import Manifest, check_corpus, load_manifest
from megascale.data.packing import count_rows, row_token_range
from megascale.data.shards import ShardStore
from megascale.errors import DataError


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
