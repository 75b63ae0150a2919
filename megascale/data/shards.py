"""Random access to the tokens of a split: its tar shards mapped into memory, each block checked on first touch."""

import io
import mmap
import zlib
from functools import lru_cache, partial

import numpy as np

from megascale.data.manifest import DOCUMENT_DTYPE, INDEX_COLUMNS, INDEX_MEMBER, Manifest, check_shard_file
from megascale.errors import DataError


class Shard:
    """One shard, mapped into memory. Arrays that it gives are read-only views of the file.

    The first touch of a block verifies its checksum and the range of its token ids, so a flipped bit is found before
    a model sees it.

    Raises:
        DataError: the file is missing, of another size than the index says, or its block table is damaged.
    """

    def __init__(self, manifest: Manifest, number: int):
        check_shard_file(manifest, number)
        self._manifest, self._info = manifest, manifest.shards[number]
        self._path = manifest.shard_path(number)
        with self._path.open("rb") as file:
            self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._table = self._read_table()
        self._is_checked = np.zeros(len(self._table), bool)
        self.block_ends = np.cumsum(self._column("tokens"))
        """Tokens of the shard up to the end of each block."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens [start, stop) of the shard: a view where one block holds them, else a copy."""
        first = int(np.searchsorted(self.block_ends, start, "right"))
        last = int(np.searchsorted(self.block_ends, stop - 1, "right"))
        parts = [self.block_tokens(block) for block in range(first, last + 1)]
        begin = int(self.block_ends[first]) - len(parts[0])
        tokens = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return tokens[start - begin : stop - begin]

    def block_tokens(self, block: int) -> np.ndarray:
        """The tokens of a block, verified."""
        offset, count = self._table[block, :2].tolist()
        tokens = np.frombuffer(self._memory, self._manifest.token_dtype, count, offset)
        if not self._is_checked[block]:
            self._check_crc(block, tokens, "token_crc32")
            if int(tokens.max()) >= self._manifest.vocab_size:
                self._fail(
                    f"block {block} holds token id {int(tokens.max())}, vocab_size = {self._manifest.vocab_size}",
                    "the corpus was made with another tokenizer: build it again with --overwrite",
                )
            self._is_checked[block] = True
        return tokens

    def document_ends(self, block: int) -> np.ndarray:
        """Cumulative ends of a block's documents in tokens, verified; the last one is the block's length."""
        offset, count = self._table[block, 2:4].tolist()
        ends = np.frombuffer(self._memory, DOCUMENT_DTYPE, count, offset)
        self._check_crc(block, ends, "document_crc32")
        return ends

    def _column(self, name: str) -> np.ndarray:
        return self._table[:, INDEX_COLUMNS.index(name)]

    def _read_table(self) -> np.ndarray:
        """The block table, as int64 [blocks, 6]."""
        info = self._info
        content = self._memory[info.index_offset : info.index_offset + info.index_bytes]
        if zlib.crc32(content) != info.index_crc32:
            self._fail(f"crc32 of member {INDEX_MEMBER} is {zlib.crc32(content):08x}, expected {info.index_crc32:08x}")
        table = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False).astype(np.int64)
        expected = (info.blocks, len(INDEX_COLUMNS))
        if table.shape != expected:
            self._fail(f"member {INDEX_MEMBER} has the shape {table.shape}, expected {expected}")
        for column, name, count in ((1, "tokens", info.tokens), (3, "documents", info.documents)):
            if int(table[:, column].sum()) != count:
                self._fail(f"member {INDEX_MEMBER} counts {int(table[:, column].sum())} {name}, expected {count}")
        return table

    def _check_crc(self, block: int, content: np.ndarray, column: str) -> None:
        found, expected = zlib.crc32(content), int(self._column(column)[block])
        if found != expected:
            self._fail(f"block {block}: {column} is {found:08x}, expected {expected:08x}")

    def _fail(
        self, fault: str, remedy: str = "the file is damaged: restore it or build the corpus again with --overwrite"
    ) -> None:
        folder = self._manifest.folder
        raise DataError(
            f"shard {self._path}: {fault} (index {self._manifest.index_path}); {remedy}; "
            f"megascale data verify {folder} checks every shard"
        )


class ShardStore:
    """The shards of a split, opened when first read; the least recently used one is closed beyond `max_open`."""

    def __init__(self, manifest: Manifest, max_open: int = 256):
        self.open = lru_cache(max_open)(partial(Shard, manifest))
        """Gives a shard by its number. May be called by several threads."""
