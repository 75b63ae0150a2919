"""Random access to the tokens of a split: its tar shards mapped into memory, each block checked on first touch."""

import io
import mmap
import zlib
from bisect import bisect_left, bisect_right
from functools import lru_cache, partial
from itertools import accumulate

import numpy as np

from megascale.data.manifest import DOCUMENT_DTYPE, INDEX_MEMBER, BlockEntry, Manifest, check_shard_file
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
        self._path, self._token_dtype = manifest.shard_path(number), manifest.token_dtype
        with self._path.open("rb") as file:
            self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.table = self._read_table()
        """The rows of the block table."""
        self._is_checked = [False] * len(self.table)
        self._block_ends = list(accumulate(block.tokens for block in self.table))

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens [start, stop) of the shard: a view where one block holds them, else a copy."""
        first = bisect_right(self._block_ends, start)
        last = bisect_left(self._block_ends, stop)
        begin = self._block_ends[first] - self.table[first].tokens
        parts = [self.block_tokens(block) for block in range(first, last + 1)]
        tokens = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return tokens[start - begin : stop - begin]

    def block_tokens(self, block: int) -> np.ndarray:
        """The tokens of a block, verified."""
        entry = self.table[block]
        tokens = np.frombuffer(self._memory, self._token_dtype, entry.tokens, entry.token_offset)
        if not self._is_checked[block]:
            self._check_crc(block, "tokens", tokens, entry.token_crc32)
            if int(tokens.max()) >= self._manifest.vocab_size:
                self._fail(
                    f"block {block} holds token id {int(tokens.max())}, vocab_size = {self._manifest.vocab_size}",
                    "the corpus was made with another tokenizer: build it again with --overwrite",
                )
            self._is_checked[block] = True
        return tokens

    def document_ends(self, block: int) -> np.ndarray:
        """Cumulative ends of a block's documents in tokens, verified; the last one is the block's length."""
        entry = self.table[block]
        ends = np.frombuffer(self._memory, DOCUMENT_DTYPE, entry.documents, entry.document_offset)
        self._check_crc(block, "document ends", ends, entry.document_crc32)
        return ends

    def _read_table(self) -> list[BlockEntry]:
        info = self._info
        content = self._memory[info.index_offset : info.index_offset + info.index_bytes]
        if zlib.crc32(content) != info.index_crc32:
            self._fail(f"crc32 of member {INDEX_MEMBER} is {zlib.crc32(content):08x}, expected {info.index_crc32:08x}")
        rows = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False).tolist()
        table = [BlockEntry(*row) for row in rows]
        found = (len(table), sum(entry.tokens for entry in table), sum(entry.documents for entry in table))
        expected = (info.blocks, info.tokens, info.documents)
        if found != expected:
            self._fail(f"member {INDEX_MEMBER} counts (blocks, tokens, documents) = {found}, expected {expected}")
        return table

    def _check_crc(self, block: int, what: str, content: np.ndarray, expected: int) -> None:
        found = zlib.crc32(content)
        if found != expected:
            self._fail(f"block {block}: crc32 of the {what} is {found:08x}, expected {expected:08x}")

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
