"""The few file operations of a checkpoint: written so that what they report done is on disk, not only in memory."""

import hashlib
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megascale.checkpoint.records import MisfitError, check_counts

_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class FileRecord:
    """What a file must be to count as undamaged.

    Attributes:
        bytes: its size.
        sha256: SHA-256 of all of it, in hexadecimal.
    """

    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        check_counts(self, "bytes")
        if not _SHA256.fullmatch(self.sha256):
            raise MisfitError("not 64 hexadecimal digits", "sha256")


def write_durably(path: Path, chunks: Iterable[bytes | memoryview]) -> FileRecord:
    """Writes a new file chunk by chunk, hashing on the way, and returns once its content is on disk.

    Raises:
        OSError: the file exists, or the system could not write or sync it.
    """
    digest, size_bytes = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        for chunk in chunks:
            rest = memoryview(chunk).cast("B")
            digest.update(rest)
            size_bytes += len(rest)
            while rest:
                rest = rest[os.write(descriptor, rest):]
        os.fsync(descriptor)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        os.close(descriptor)
    return FileRecord(bytes=size_bytes, sha256=digest.hexdigest())


def sync_folder(folder: Path) -> None:
    """Puts the names in a folder on disk: new files and renames survive a power loss only after this."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_durably(source: Path, target: Path) -> None:
    """Renames within one file system and puts the new name on disk. Other processes see the old or the new name."""
    os.rename(source, target)
    sync_folder(target.parent)
    if source.parent != target.parent:
        sync_folder(source.parent)


def size_of_regular_file(path: Path) -> int | None:
    """The size in bytes, or None where there is no such file, or a link, folder, pipe or device instead."""
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def read_bounded(path: Path, limit_bytes: int) -> bytes | None:
    """Reads a small file whole; None where it is missing, no regular file, or larger than the limit."""
    size_bytes = size_of_regular_file(path)
    if size_bytes is None or size_bytes > limit_bytes:
        return None
    with path.open("rb") as file:
        return file.read(limit_bytes)


def hash_file(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(folder: Path) -> int:
    """Bytes that this user can still write on the file system of a folder."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize
