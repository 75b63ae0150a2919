"""Checkpoints in a run folder: a draft is a folder under a temporary name, and a rename commits it."""

import contextlib
import mmap
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megascale.checkpoint.files import (
    FileRecord,
    free_bytes,
    hash_file,
    move_durably,
    read_bounded,
    size_of_regular_file,
    sync_folder,
    write_durably,
)
from megascale.checkpoint.folders import (
    CHECKPOINTS,
    QUARANTINE,
    REASON_NAME,
    checkpoint_path,
    free_name,
    is_leftover,
    list_names,
    list_steps,
    temporary_path,
)


class LocalStore:
    """See `megascale.checkpoint.store.Store`; on a file system that all ranks share."""

    def __init__(self, run_folder: Path):
        self.run_folder = Path(run_folder)
        self.place = str(run_folder)

    def path(self, step: int) -> Path:
        """See `Store`."""
        return checkpoint_path(self.run_folder, step)

    def steps(self) -> list[int]:
        """See `Store`."""
        return list_steps(self.run_folder)

    def prepare(self, token: str) -> None:
        """See `Store`. What can't be removed stays: its name is random or a `.trash`, and collides with nothing."""
        folder = self.run_folder / CHECKPOINTS
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(self.run_folder)  # always: another rank's draft may just have made the folder
        for name in list_names(folder):
            if is_leftover(name) and not name.endswith(f".tmp-{token}"):
                shutil.rmtree(folder / name, ignore_errors=True)

    def free_bytes(self) -> int | None:
        """See `Store`."""
        folder = self.run_folder / CHECKPOINTS
        return free_bytes(folder if folder.is_dir() else self.run_folder)

    def draft(self, step: int, token: str) -> "LocalDraft":
        """See `Store`."""
        folder = temporary_path(self.run_folder, step, token)
        folder.mkdir(parents=True, exist_ok=True)
        return LocalDraft(folder, self.path(step))

    def read_small(self, step: int, name: str, limit_bytes: int) -> bytes | None:
        """See `Store`."""
        return read_bounded(self.path(step) / name, limit_bytes)

    def size_bytes(self, step: int, name: str) -> int | None:
        """See `Store`."""
        return size_of_regular_file(self.path(step) / name)

    def is_whole(self, step: int, name: str, record: FileRecord) -> bool:
        """See `Store`."""
        return is_whole_file(self.path(step) / name, record)

    @contextlib.contextmanager
    def open(self, step: int, name: str) -> Iterator["MappedFile"]:
        """See `Store`. The file is mapped, so only pages that are looked at are read."""
        path = self.path(step) / name
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                yield MappedFile(memoryview(b""))
                return
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        yield MappedFile(memoryview(mapped))  # unmapped with the last view of it

    def delete(self, step: int) -> None:
        """See `Store`. One that can't be deleted, as on NFS while somebody reads it, is left to the next save."""
        path = self.path(step)
        trash = path.with_name(f"{path.name}.trash")
        move_durably(path, trash)
        shutil.rmtree(trash, ignore_errors=True)

    def quarantine(self, step: int, reason: str) -> Path:
        """See `Store`."""
        path = self.path(step)
        target = free_name(self.run_folder / QUARANTINE / path.name)
        target.parent.mkdir(exist_ok=True)
        move_durably(path, target)
        if target.is_dir():
            write_durably(free_name(target / REASON_NAME), [f"{reason}\n".encode()])
        return target

    def has_quarantine(self) -> bool:
        """See `Store`."""
        return bool(list_names(self.run_folder / QUARANTINE))


@dataclass(frozen=True)
class LocalDraft:
    """See `megascale.checkpoint.store.Draft`.

    Attributes:
        folder: where it is written.
        final: what it becomes.
    """

    folder: Path
    final: Path

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> FileRecord:
        """See `Draft`."""
        return write_durably(self.folder / name, chunks)

    def is_whole(self, name: str, record: FileRecord) -> bool:
        """See `Draft`. The system is asked to forget the file first, so that it is read from the disk."""
        with (self.folder / name).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return is_whole_file(self.folder / name, record)

    def read_small(self, name: str, limit_bytes: int) -> bytes | None:
        """See `Draft`."""
        return read_bounded(self.folder / name, limit_bytes)

    def stored_bytes(self) -> int:
        """See `Draft`."""
        return sum(size_of_regular_file(self.folder / name) or 0 for name in list_names(self.folder))

    def remove(self, name: str) -> None:
        """See `Draft`."""
        (self.folder / name).unlink()

    def seal(self) -> None:
        """See `Draft`."""
        sync_folder(self.folder)

    def commit(self) -> None:
        """See `Draft`."""
        sync_folder(self.folder)
        move_durably(self.folder, self.final)

    def abandon(self) -> None:
        """See `Draft`."""
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class MappedFile:
    """See `megascale.checkpoint.store.Content`."""

    view: memoryview

    @property
    def size_bytes(self) -> int:
        """See `Content`."""
        return len(self.view)

    def read(self, start: int, stop: int) -> memoryview:
        """See `Content`."""
        return self.view[start:stop]


def is_whole_file(path: Path, record: FileRecord) -> bool:
    """Whether a regular file has the size and the hash of the record. Raises OSError where it can't be read."""
    return size_of_regular_file(path) == record.bytes and hash_file(path) == record.sha256
