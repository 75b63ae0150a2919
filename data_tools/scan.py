"""Reads a shard without any index: its members, its blocks, and what the table of a split says of it."""

import hashlib
import re
import zlib
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tokenizers import Tokenizer

from data_tools.tar_walk import walk_tar
from megascale.data.manifest import DOCUMENT_DTYPE, INDEX_MEMBER, BlockEntry, ShardInfo
from megascale.errors import DataError

NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00v\x00\{'descr': '(<u[248])', 'fortran_order': False, 'shape': \((\d{1,12}),(?: (\d{1,12}))?\), "
    rb"\} *\n"
)
"""What the arrays of a shard begin with; others aren't read, so that no header can claim a size of its own."""
NPY_HEADER_BYTES = 128


def scan_shard(path: Path, vocab_size: int, eos_id: int) -> ShardInfo:
    """What the table says of a shard, from its bytes.

    Raises:
        DataError: its structure, its blocks or its own block table aren't those of an undamaged shard.
    """
    entries: list[BlockEntry] = []
    table = None
    with path.open("rb") as file:
        for kind, offset, array in read_arrays(file, path):
            if table is not None:
                raise damage(path, f"member {INDEX_MEMBER} isn't the last one")
            if kind == INDEX_MEMBER:
                table = offset, array
            elif kind == "docs":
                ends_offset, ends = offset, array
            else:
                check_block(path, len(entries), array, ends, vocab_size, eos_id)
                sums = zlib.crc32(array), zlib.crc32(ends)
                entries.append(BlockEntry(offset, len(array), ends_offset, len(ends), *sums))
        check_table(path, None if table is None else table[1], entries)
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        index_bytes = table[1].nbytes + NPY_HEADER_BYTES
        file.seek(table[0] - NPY_HEADER_BYTES)
        return ShardInfo(
            number=shard_number(path),
            bytes=path.stat().st_size,
            tokens=sum(entry.tokens for entry in entries),
            documents=sum(entry.documents for entry in entries),
            blocks=len(entries),
            index_offset=table[0] - NPY_HEADER_BYTES,
            index_bytes=index_bytes,
            index_crc32=zlib.crc32(file.read(index_bytes)),
            sha256=sha256,
        )


def read_arrays(file: BinaryIO, path: Path) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yields (docs, tokens or `__index__`; byte of the first element; elements) of each member, in a shard's order.

    Raises:
        DataError: a member of another name or kind than is due.
    """
    size, place, members = path.stat().st_size, f"shard {path}", 0
    for member in walk_tar(file, place):
        block, kind = members // 2, ("docs", "tokens")[members % 2]
        due = f"{shard_number(path):06d}_{block:06d}.{kind}.npy"
        if member.name == INDEX_MEMBER and kind == "docs":
            due = kind = INDEX_MEMBER
        if member.name != due:
            raise damage(path, f"member {member.name} where {due} is due")
        content = file.read(min(member.size, size))
        if len(content) == member.size:  # else the walk says that the shard is cut short
            yield kind, member.offset + NPY_HEADER_BYTES, parse_array(content, path, due)
        members += kind != INDEX_MEMBER


def parse_array(content: bytes, path: Path, name: str) -> np.ndarray:
    """The array of a member."""
    header = NPY_HEADER.fullmatch(content[:NPY_HEADER_BYTES])
    shape = tuple(int(length) for length in header.group(2, 3) if length) if header else ()
    if not header or prod(shape) * np.dtype(header[1].decode()).itemsize != len(content) - NPY_HEADER_BYTES:
        raise damage(path, f"member {name} isn't the .npy file of an array of {len(content)} bytes")
    return np.frombuffer(content, header[1].decode(), offset=NPY_HEADER_BYTES).reshape(shape)


def check_block(path: Path, block: int, tokens: np.ndarray, ends: np.ndarray, vocab_size: int, eos_id: int) -> None:
    """Refuses a block of tokens that the tokenizer doesn't have, or of documents that don't end as they must."""
    dtype = token_dtype(vocab_size)
    if (tokens.dtype, ends.dtype, tokens.ndim, ends.ndim) != (dtype, DOCUMENT_DTYPE, 1, 1):
        raise damage(path, f"block {block} has tokens of {tokens.dtype} and document ends of {ends.dtype}; expected "
                           f"{dtype}, as {vocab_size} token ids need, and {DOCUMENT_DTYPE}")
    bounds = np.concatenate([[0], ends.astype(np.int64)])
    if not len(ends) or bounds[-1] != len(tokens) or not (np.diff(bounds) > 0).all():
        raise damage(path, f"block {block}: document ends don't rise from 1 to its {len(tokens)} tokens")
    if int(tokens.max()) >= vocab_size:
        raise damage(path, f"block {block} holds token id {int(tokens.max())}, the tokenizer has {vocab_size}")
    if not (tokens[bounds[1:] - 1] == eos_id).all():
        raise damage(path, f"block {block} doesn't end its documents with token {eos_id}")


def check_table(path: Path, table: np.ndarray | None, entries: list[BlockEntry]) -> None:
    """Refuses a shard whose own block table doesn't say what was found in it."""
    if table is None or not entries:
        raise damage(path, f"it has {len(entries)} blocks and {'no' if table is None else 'a'} member {INDEX_MEMBER}")
    if table.dtype != np.dtype("<u8") or table.shape != (len(entries), len(BlockEntry._fields)):
        raise damage(path, f"member {INDEX_MEMBER} is {table.dtype} {table.shape} for {len(entries)} blocks")
    for block, (found, said) in enumerate(zip(entries, table.tolist(), strict=True)):
        for name, value, expected in zip(BlockEntry._fields, found, said, strict=True):
            if value != expected:
                raise damage(path, f"block {block}: {name} is {value}, member {INDEX_MEMBER} says {expected}")


def count_text_bytes(paths: list[Path], tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of the text of shards, by decoding them: what a byte-level BPE tokenizer encoded, exactly."""
    num_bytes = 0
    for path in paths:
        with path.open("rb") as file:
            for kind, _, array in read_arrays(file, path):
                if kind == "docs":
                    ends = array
                elif kind == "tokens":
                    documents = [part[:-1].tolist() for part in np.split(array, ends[:-1].astype(np.int64))]
                    texts = tokenizer.decode_batch(documents, skip_special_tokens=False)
                    num_bytes += sum(len(text.encode()) for text in texts)
    return num_bytes


def token_dtype(vocab_size: int) -> np.dtype:
    """Type of a token on disk: the smallest that writes every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def shard_number(path: Path) -> int:
    """The number in the name of a shard."""
    return int(path.name.removeprefix("shard-").removesuffix(".tar"))


def damage(path: Path, fault: str) -> DataError:
    """What is wrong with a shard."""
    return DataError(f"shard {path}: {fault}; restore the file or build the corpus again with --overwrite")
