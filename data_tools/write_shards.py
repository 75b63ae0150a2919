"""Writes tokens as shards: block members in WebDataset tars, a block table as the last member of each."""

import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from webdataset import TarWriter

from megascale.data.manifest import (
    DOCUMENT_DTYPE,
    FORMAT_VERSION,
    INDEX_FILE,
    INDEX_MEMBER,
    TABLE_FILE,
    BlockEntry,
    Index,
    ShardInfo,
    index_bytes,
    shard_name,
    table_bytes,
    table_of,
)


def write_shards(
    folder: Path,
    documents: Iterable[np.ndarray],
    dtype: np.dtype,
    shard_tokens: int,
    block_tokens: int,
    first_number: int = 0,
) -> tuple[ShardInfo, ...]:
    """Writes documents into the numbered shards of a folder, which must be new.

    A block closes at the end of the document that reaches `block_tokens`, a shard at the block that reaches
    `shard_tokens`, so both hold whole documents. Equal documents give equal files, byte for byte.

    Args:
        folder: folder of the split.
        documents: tokens of each document, its end-of-text token included.
        dtype: type of a token on disk.
        shard_tokens: tokens of a shard.
        block_tokens: tokens of a block; at most those of a shard.
        first_number: number of the first shard.
    """
    folder.mkdir(parents=True)
    blocks = group_documents(documents, min(block_tokens, shard_tokens))
    shards: list[ShardInfo] = []
    for block in blocks:
        shards.append(write_shard(folder, first_number + len(shards), chain([block], blocks), dtype, shard_tokens))
    return tuple(shards)


def write_index(folder: Path, shards: Sequence[ShardInfo], **facts) -> None:
    """Writes the table of a split's shards, then `index.json`, which declares it complete, each whole or not at all.

    Args:
        folder: folder of the split.
        shards: all of its shards.
        facts: the other fields of `Index`: split, dtype, vocab_size, eos_id, text_bytes, tokenizer_file,
            tokenizer_sha256.
    """
    table = table_bytes(table_of(list(shards)))
    index = Index(
        format_version=FORMAT_VERSION,
        num_shards=len(shards),
        num_tokens=sum(shard.tokens for shard in shards),
        num_documents=sum(shard.documents for shard in shards),
        table_sha256=hashlib.sha256(table).hexdigest(),
        **facts,
    )
    write_file(folder / TABLE_FILE, table)
    write_file(folder / INDEX_FILE, index_bytes(index))


def group_documents(documents: Iterable[np.ndarray], block_tokens: int) -> Iterator[list[np.ndarray]]:
    """Groups documents into blocks of at least `block_tokens`, the last one excepted."""
    block, size = [], 0
    for document in documents:
        block.append(document)
        size += len(document)
        if size >= block_tokens:
            yield block
            block, size = [], 0
    if block:
        yield block


def write_shard(
    folder: Path, number: int, blocks: Iterator[list[np.ndarray]], dtype: np.dtype, shard_tokens: int
) -> ShardInfo:
    """Writes one shard from the next blocks, and takes no more of them than the shard holds."""
    path = folder / shard_name(number)
    table: list[BlockEntry] = []
    with path.with_suffix(".tmp").open("xb") as raw:
        file = HashingWriter(raw)
        with TarWriter(file, encoder=False, mtime=0) as writer:
            for documents in blocks:
                table.append(write_block(writer, f"{number:06d}_{len(table):06d}", documents, dtype))
                if sum(entry.tokens for entry in table) >= shard_tokens:
                    break
            index = npy_bytes(np.array(table, "<u8"))
            index_offset = write_index_member(writer, index)
        raw.flush()
        os.fsync(raw.fileno())
        path.with_suffix(".tmp").rename(path)
        return ShardInfo(
            number=number,
            bytes=raw.tell(),
            tokens=sum(entry.tokens for entry in table),
            documents=sum(entry.documents for entry in table),
            blocks=len(table),
            index_offset=index_offset,
            index_bytes=len(index),
            index_crc32=zlib.crc32(index),
            sha256=file.digest.hexdigest(),
        )


def write_block(writer: TarWriter, key: str, documents: list[np.ndarray], dtype: np.dtype) -> BlockEntry:
    """Writes a block as the WebDataset sample `key` and returns its row of the block table."""
    ends = np.cumsum([len(document) for document in documents]).astype(DOCUMENT_DTYPE)
    tokens = np.concatenate(documents).astype(dtype)
    document_offset = write_member(writer, key, "docs.npy", ends)
    token_offset = write_member(writer, key, "tokens.npy", tokens)
    return BlockEntry(token_offset, len(tokens), document_offset, len(ends), zlib.crc32(tokens), zlib.crc32(ends))


def write_member(writer: TarWriter, key: str, extension: str, array: np.ndarray) -> int:
    """Writes an array as a .npy member and returns the offset of its first element in the tar."""
    content = npy_bytes(array)
    header_offset = writer.tarstream.offset
    writer.write({"__key__": key, extension: content})
    return header_offset + tarfile.BLOCKSIZE + len(content) - array.nbytes


def write_index_member(writer: TarWriter, content: bytes) -> int:
    """Writes the block table and returns the offset of its content.

    Its name has no extension, so readers of WebDatasets pass over it.
    """
    member = tarfile.TarInfo(INDEX_MEMBER)
    member.size, member.mode, member.uname, member.gname = len(content), writer.mode, writer.user, writer.group
    header_offset = writer.tarstream.offset
    writer.tarstream.addfile(member, io.BytesIO(content))
    return header_offset + tarfile.BLOCKSIZE


def npy_bytes(array: np.ndarray) -> bytes:
    """An array as the content of a .npy file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def write_file(path: Path, content: bytes) -> None:
    """Writes a small file whole or not at all, also when the machine fails."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class HashingWriter:
    """A file that is only written to, hashed on the way."""

    def __init__(self, file):
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        return self._file.write(content)
