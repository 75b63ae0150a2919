"""Reads and mends the `.wandb` files of earlier sessions, which tell which steps W&B already has.

The format is LevelDB's log: a 7-byte header, then blocks of 32 KiB with chunks of `checksum, length, type, bytes`,
where type 1 is a whole record, and 2, 3, 4 its first, middle and last part. A record is a protobuf message of wandb.
"""

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

_MAGIC = b":W&B"
_FILE_HEADER_BYTES = 7
_BLOCK_BYTES = 32 * 1024
_CHUNK_HEADER = struct.Struct("<IHB")
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def session_files(run_folder: Path, run_id: str) -> list[Path]:
    """The `.wandb` files of a run's earlier sessions, oldest first; `latest-run`, a link to one of them, left out."""
    return sorted(path for path in run_folder.glob(f"wandb/*run-*-{run_id}/run-{run_id}.wandb"))


def is_unsynced_offline(path: Path) -> bool:
    """Whether a file holds metrics that only `wandb sync` can still bring to the server."""
    return path.parent.name.startswith("offline-") and not _synced_marker(path).exists()


def read_records(content: bytes) -> Iterator[tuple[bytes, int]]:
    """Yields each whole record and the offset of its end; ends at the first torn or damaged one."""
    if content[: len(_MAGIC)] != _MAGIC:
        return
    offset, record = _FILE_HEADER_BYTES, b""
    while offset + _CHUNK_HEADER.size <= len(content):
        left_in_block = _BLOCK_BYTES - offset % _BLOCK_BYTES
        if left_in_block < _CHUNK_HEADER.size:
            offset += left_in_block
            continue
        checksum, num_bytes, kind = _CHUNK_HEADER.unpack_from(content, offset)
        offset += _CHUNK_HEADER.size
        chunk = content[offset : offset + num_bytes]
        if zlib.crc32(bytes([kind]) + chunk) != checksum or kind not in (_WHOLE, _FIRST, _MIDDLE, _LAST):
            return
        offset += num_bytes
        record = chunk if kind in (_WHOLE, _FIRST) else record + chunk
        if kind in (_WHOLE, _LAST):
            yield record, offset


def history_steps(content: bytes) -> list[int]:
    """The steps of the history rows in a file, in the order in which they were logged."""
    messages = (Record.FromString(record) for record, _ in read_records(content))
    return [message.history.step.num for message in messages if message.WhichOneof("record_type") == "history"]


def mend(path: Path) -> int:
    """Makes the file of a killed session fit for `wandb sync`, and returns the last step in it, -1 without one.

    `wandb sync` stops at a torn record, leaves out the later sessions of the run, and uploads the rows before the tear
    a second time when it is called again; a file that ends with a whole record it takes as it is. So a torn end is cut
    off, and a file without any row, which would stop it as well, gets the marker of one that is synced already.
    """
    content = path.read_bytes()
    end = max((end for _, end in read_records(content)), default=0)
    if 0 < end < len(content):
        os.truncate(path, end)
    steps = history_steps(content)
    if not steps:
        _synced_marker(path).touch()
    return max(steps, default=-1)


def _synced_marker(path: Path) -> Path:
    return path.with_suffix(".wandb.synced")
