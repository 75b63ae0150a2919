"""Random access to the tokens of a shard: a tar in memory or mapped into it, each block checked on first touch."""

import mmap
import zlib
from bisect import bisect_left, bisect_right
from itertools import accumulate
from typing import NoReturn

import numpy as np

from megascale.data.location import local_path
from megascale.data.manifest import DOCUMENT_DTYPE, INDEX_MEMBER, BlockEntry, Manifest, check_shard_size
from megascale.data.npy import parse_npy
from megascale.errors import DataError

BLOCK_DTYPE = np.dtype("<u8")
"""A number of the block table."""


class Shard:
    """One shard. Arrays that it gives are read-only views of its memory.

    The first touch of a block verifies its checksum and the range of its token ids, so a flipped bit is found before
    a model sees it.

    Args:
        manifest: the split.
        position: of the shard in the split's table.
        memory: the bytes of the tar, mapped or read, as many as the table says.
        place: where they were read, for messages, when that isn't the shard's own place.

    Raises:
        DataError: its block table is damaged.
    """

    def __init__(self, manifest: Manifest, position: int, memory: mmap.mmap | bytes, place: str | None = None):
        self._manifest, self._info, self._memory = manifest, manifest.shard(position), memory
        self.place, self._token_dtype = place or manifest.shard_place(position), manifest.token_dtype
        self.table = self._read_table()
        """The rows of the block table."""
        self._block_ends = list(accumulate(block.tokens for block in self.table))
        self._block_starts = [0, *self._block_ends[:-1]]
        self._tokens: list[np.ndarray | None] = [None] * len(self.table)
        self._ends: list[np.ndarray | None] = [None] * len(self.table)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens [start, stop) of the shard: a view where one block holds them, else a copy."""
        first = bisect_right(self._block_ends, start)
        begin = self._block_starts[first]
        if stop <= self._block_ends[first]:
            return self.block_tokens(first)[start - begin : stop - begin]
        last = bisect_left(self._block_ends, stop)
        tokens = np.concatenate([self.block_tokens(block) for block in range(first, last + 1)])
        return tokens[start - begin : stop - begin]

    def block_of(self, token: int) -> int:
        """The block that holds a token of the shard."""
        return bisect_right(self._block_ends, token)

    def block_tokens(self, block: int) -> np.ndarray:
        """The tokens of a block, verified."""
        tokens = self._tokens[block]
        if tokens is None:
            tokens = self._tokens[block] = self._read_tokens(block)
        return tokens

    def document_ends(self, block: int) -> np.ndarray:
        """Cumulative ends of a block's documents in tokens, verified; the last one is the block's length."""
        ends = self._ends[block]
        if ends is None:
            ends = self._ends[block] = self._read_ends(block)
        return ends

    def read_documents(self, start: int, stop: int) -> tuple[np.ndarray, list[int]]:
        """The tokens [start, stop) of the shard, and where documents end within them, not counting `stop` itself.

        The hot path of reading: one search where one block holds the tokens.
        """
        block = bisect_right(self._block_ends, start)
        begin, tokens, ends = self._block_starts[block], self._tokens[block], self._ends[block]
        if stop > self._block_ends[block] or tokens is None or ends is None:
            return self.read(start, stop), [end - start for end in self.ends_between(start, stop)]
        # A search in a memoryview takes a quarter of the time of numpy's.
        skip, stop, view = start - begin, stop - begin, ends.data
        low = bisect_right(view, skip)
        return tokens[skip:stop], [end - skip for end in view[low : bisect_left(view, stop, low)].tolist()]

    def ends_between(self, start: int, stop: int) -> list[int]:
        """Where documents end between two tokens of the shard: the places e with start < e < stop, rising.

        Reads the blocks that hold these tokens only.
        """
        first, last = bisect_right(self._block_ends, start), bisect_left(self._block_ends, stop)
        found: list[int] = []
        for block in range(first, last + 1):
            ends, begin = self.document_ends(block).data, self._block_starts[block]
            low = bisect_right(ends, start - begin)
            found += [begin + end for end in ends[low : bisect_left(ends, stop - begin, low)].tolist()]
        return found

    def all_ends(self) -> np.ndarray:
        """Where the documents of the shard end, int64. Reads the document ends of all blocks."""
        parts = [self.document_ends(block) + np.int64(begin) for block, begin in enumerate(self._block_starts)]
        return np.concatenate(parts)

    def document_of(self, token: int) -> tuple[int, int]:
        """(block, document within the block) of a token of the shard."""
        block = self.block_of(token)
        return block, bisect_right(self.document_ends(block).data, token - self._block_starts[block])

    def _read_tokens(self, block: int) -> np.ndarray:
        entry = self.table[block]
        tokens = np.frombuffer(self._memory, self._token_dtype, entry.tokens, entry.token_offset)
        self._check_crc(block, "tokens", tokens, entry.token_crc32)
        if self._manifest.holds_images:
            return tokens
        largest = int(tokens.max())
        if largest >= self._manifest.vocab_size:
            self._fail(
                f"block {block} holds token id {largest}, vocab_size = {self._manifest.vocab_size}",
                "the corpus was made with another tokenizer: build it again with --overwrite",
            )
        return tokens

    def _read_ends(self, block: int) -> np.ndarray:
        entry = self.table[block]
        if self._manifest.holds_images:
            return np.array([entry.tokens], DOCUMENT_DTYPE)
        ends = np.frombuffer(self._memory, DOCUMENT_DTYPE, entry.documents, entry.document_offset)
        self._check_crc(block, "document ends", ends, entry.document_crc32)
        if ends[0] < 1 or ends[-1] != entry.tokens or not (ends[:-1] < ends[1:]).all():
            self._fail(
                f"block {block}: its {entry.documents} document ends, the last one {ends[-1]}, don't rise to its "
                f"{entry.tokens} tokens"
            )
        return ends

    def _read_table(self) -> list[BlockEntry]:
        info, size = self._info, len(self._memory)
        if not 0 <= info.index_offset <= info.index_offset + info.index_bytes <= size:
            self._fail(
                f"member {INDEX_MEMBER} should be {info.index_bytes} bytes at {info.index_offset}, the file has {size}"
            )
        content = self._memory[info.index_offset : info.index_offset + info.index_bytes]
        if zlib.crc32(content) != info.index_crc32:
            self._fail(f"crc32 of member {INDEX_MEMBER} is {zlib.crc32(content):08x}, expected {info.index_crc32:08x}")
        table = self._parse_table(content)
        found = (len(table), sum(entry.tokens for entry in table), sum(entry.documents for entry in table))
        expected = (info.blocks, info.tokens, info.documents)
        if found != expected:
            self._fail(f"member {INDEX_MEMBER} counts (blocks, tokens, documents) = {found}, expected {expected}")
        for block, entry in enumerate(table):
            token_end = entry.token_offset + entry.tokens * self._token_dtype.itemsize
            document_end = entry.document_offset + entry.documents * DOCUMENT_DTYPE.itemsize
            if not 1 <= entry.documents <= entry.tokens or max(token_end, document_end) > size:
                self._fail(
                    f"block {block}: {entry.tokens} tokens at byte {entry.token_offset} in {entry.documents} documents "
                    f"at byte {entry.document_offset} don't lie within the {size} bytes of the file"
                )
        return table

    def _parse_table(self, content: bytes) -> list[BlockEntry]:
        """The block table from the bytes of its .npy file."""
        try:
            table = parse_npy(content, BLOCK_DTYPE, (self._info.blocks, len(BlockEntry._fields)))
        except ValueError as error:
            self._fail(f"member {INDEX_MEMBER} is no block table ({error})")
        return [BlockEntry(*row) for row in table.tolist()]

    def _check_crc(self, block: int, what: str, content: np.ndarray, expected: int) -> None:
        found = zlib.crc32(content)
        if found != expected:
            self._fail(f"block {block}: crc32 of the {what} is {found:08x}, expected {expected:08x}")

    def _fail(
        self, fault: str, remedy: str = "the file is damaged: restore it or build the corpus again with --overwrite"
    ) -> NoReturn:
        folder = self._manifest.folder
        raise DataError(
            f"shard {self.place}: {fault} (index {self._manifest.index_place}); {remedy}; "
            f"megascale data verify {folder} checks every shard"
        )


def map_shard(manifest: Manifest, position: int) -> Shard:
    """Opens a shard of a local corpus.

    Raises:
        DataError: the file is missing, of another size than the table says, or damaged.
    """
    check_shard_size(manifest, position)
    place = manifest.shard_place(position)
    if manifest.shard(position).bytes == 0:
        raise DataError(f"shard {place} is empty, as {manifest.index_place} says; build the corpus again")
    with local_path(place).open("rb") as file:
        return Shard(manifest, position, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
