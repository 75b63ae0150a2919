"""Writes images as shards, each a WebDataset sample of a class and an encoded image, and verifies such shards."""

import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
from webdataset import TarWriter
from webdataset.tariterators import group_by_keys, tar_file_expander

from data_tools.scan import check_table, damage, parse_array, shard_number
from data_tools.tar_walk import walk_tar
from data_tools.write_shards import HashingWriter, npy_bytes, write_index_member
from megascale.data.images import IMAGE_START, LABEL_DIGITS, decode_sample
from megascale.data.location import local_path
from megascale.data.manifest import INDEX_MEMBER, BlockEntry, Manifest, ShardInfo, shard_name
from megascale.data.shards import map_shard
from megascale.errors import DataError

Sample = tuple[int, str, bytes]
"""Class, extension, encoded image."""


def write_image_shards(folder: Path, samples: Iterable[Sample], shard_bytes: int) -> tuple[ShardInfo, ...]:
    """Writes samples into the numbered shards of a folder, which must be new.

    Args:
        shard_bytes: of a shard; it closes at the image that reaches it.
    """
    folder.mkdir(parents=True)
    samples, shards = iter(samples), []
    for sample in samples:
        shards.append(write_image_shard(folder, len(shards), chain([sample], samples), shard_bytes))
    return tuple(shards)


def write_image_shard(folder: Path, number: int, samples: Iterator[Sample], shard_bytes: int) -> ShardInfo:
    """Writes one shard from the next samples, and takes no more of them than the shard holds."""
    path, table = folder / shard_name(number), []
    with path.with_suffix(".tmp").open("xb") as raw:
        file = HashingWriter(raw)
        with TarWriter(file, encoder=False, mtime=0) as writer:
            for sample in samples:
                table.append(write_sample(writer, f"{number:06d}_{len(table):06d}", *sample))
                if writer.tarstream.offset >= shard_bytes:
                    break
            index = npy_bytes(np.array(table, "<u8"))
            index_offset = write_index_member(writer, index)
        raw.flush()
        os.fsync(raw.fileno())
        path.with_suffix(".tmp").rename(path)
        return ShardInfo(
            number, raw.tell(), sum(entry.tokens for entry in table), len(table), len(table), index_offset, len(index),
            zlib.crc32(index), file.digest.hexdigest(),
        )


def write_sample(writer: TarWriter, key: str, label: int, extension: str, image: bytes) -> BlockEntry:
    """Writes an image as the WebDataset sample `key` and returns its row of the block table.

    The row's tokens are the bytes of the tar from the class's first to the image's last, its one document the image.
    """
    begin = writer.tarstream.offset + tarfile.BLOCKSIZE
    digits = f"{label:0{LABEL_DIGITS}d}".encode()
    add_member(writer, f"{key}.cls", digits)
    header = add_member(writer, f"{key}.{extension}", image)
    span = digits.ljust(IMAGE_START - len(header), b"\0") + header + image
    return BlockEntry(begin, len(span), begin + IMAGE_START, 1, zlib.crc32(span), zlib.crc32(image))


def add_member(writer: TarWriter, name: str, content: bytes) -> bytes:
    """Writes a plain file and returns its header."""
    member, tar = tarfile.TarInfo(name), writer.tarstream
    member.size, member.mode, member.uname, member.gname = len(content), writer.mode, writer.user, writer.group
    header = member.tobuf(tar.format, tar.encoding, tar.errors)
    tar.addfile(member, io.BytesIO(content))
    return header


def verify_image_shard(manifest: Manifest, position: int) -> np.ndarray:
    """Verifies one shard of images, decodes them all, and returns a hash of each, uint64.

    Raises:
        DataError: its first fault.
    """
    path, info = local_path(manifest.shard_place(position)), manifest.shard(position)
    shard = map_shard(manifest, position)
    for number in range(info.blocks):
        decode_sample(shard.block_tokens(number), manifest.vocab_size, f"shard {path}, image {number}")
    found = scan_image_shard(path)
    for field, value, expected in zip(ShardInfo._fields, found, info, strict=True):
        if value != expected:
            raise DataError(
                f"shard {path}: {field} is {value}, {manifest.index_place} says {expected}; restore it or make the"
                " corpus again with --overwrite"
            )
    hashes = []
    with path.open("rb") as file:
        for number, sample in enumerate(group_by_keys(tar_file_expander([{"url": str(path), "stream": file}]))):
            content = shard.block_tokens(number).tobytes()
            (image,) = (value for key, value in sample.items() if key in ("jpg", "png", "webp"))
            if (sample["cls"], image) != (content[:LABEL_DIGITS], content[IMAGE_START:]):
                raise DataError(f"shard {path}: webdataset reads another image {number} than megascale")
            hashes.append(hashlib.blake2b(image, digest_size=8).digest())
    return np.frombuffer(b"".join(hashes), "<u8")


def scan_image_shard(path: Path) -> ShardInfo:
    """What the table says of a shard of images, from its bytes.

    Raises:
        DataError: its structure or its own block table isn't that of an undamaged shard.
    """
    entries, table, number = [], None, shard_number(path)
    with path.open("rb") as file:
        for count, member in enumerate(walk_tar(file, f"shard {path}")):
            key = f"{number:06d}_{len(entries):06d}"
            if member.name == INDEX_MEMBER and count % 2 == 0:
                content = file.read(member.size)
                table = member.offset, content
            elif table is not None or member.name.rpartition(".")[0] != key or (
                (member.name.rpartition(".")[2] == "cls") != (count % 2 == 0)
            ):
                raise damage(path, f"member {member.name} where one of image {key} is due")
            elif count % 2 == 0:
                begin = member.offset
            else:
                entries.append(scan_sample(path, begin, member.offset, member.size))
        array = None if table is None else parse_array(table[1], path, INDEX_MEMBER)
        check_table(path, array, entries)
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return ShardInfo(
        number, path.stat().st_size, sum(entry.tokens for entry in entries), len(entries), len(entries), table[0],
        len(table[1]), zlib.crc32(table[1]), sha256,
    )


def scan_sample(path: Path, begin: int, offset: int, size: int) -> BlockEntry:
    """The row of the block table of the sample from byte `begin` on, whose image is `size` bytes at `offset`."""
    if offset != begin + IMAGE_START:
        raise damage(path, f"the image at byte {offset} doesn't follow its class at byte {begin}")
    with path.open("rb") as file:  # its own position: the walk goes on where it was
        file.seek(begin)
        span = file.read(IMAGE_START + size)
    return BlockEntry(begin, len(span), offset, 1, zlib.crc32(span), zlib.crc32(span[IMAGE_START:]))
