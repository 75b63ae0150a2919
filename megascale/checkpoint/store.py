"""Where the checkpoints of one run lie, as the rest of this package sees it: two protocols, and how one is opened.

A checkpoint is a *draft* until it is committed, all at once. `LocalStore` is a run folder, `ObjectStore` a place in an
object store; both keep the same promises.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from megascale.checkpoint.files import FileRecord


class Content(Protocol):
    """The bytes of a stored file."""

    size_bytes: int

    def read(self, start: int, stop: int) -> memoryview:
        """The bytes [start, stop); mapped or fetched, so asking for less costs less."""


class Draft(Protocol):
    """A checkpoint that is being written by all ranks and that no reader sees."""

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> FileRecord:
        """Writes a new file, hashing on the way; returns once its content is durable. Raises OSError."""

    def is_whole(self, name: str, record: FileRecord) -> bool:
        """Reads a file back, from the medium where the system allows it, and compares it with what was written."""

    def read_small(self, name: str, limit_bytes: int) -> bytes | None:
        """A small file whole; None where it is missing or larger."""

    def stored_bytes(self) -> int:
        """How much all ranks have written of it; asked for only where `Store.free_bytes` is a number."""

    def remove(self, name: str) -> None:
        """Removes a file."""

    def seal(self) -> None:
        """Puts the names of this rank's files on disk."""

    def commit(self) -> None:
        """Makes the draft the checkpoint of its step, all at once and durably."""

    def abandon(self) -> None:
        """Removes what there is of it, as far as possible; never raises."""


class Store(Protocol):
    """The committed checkpoints of one run, by step.

    Attributes:
        place: what `open_store` opens it by.
    """

    place: str

    def path(self, step: int) -> Path | str:
        """Where the checkpoint of a step is, or would be: for messages, and as what its files' names are joined to."""

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending; whether they are whole is not looked at."""

    def prepare(self, token: str) -> None:
        """Makes room for a draft: what killed saves and deletions left is removed, but for drafts of this token."""

    def free_bytes(self) -> int | None:
        """Bytes that can still be written; None where there is no limit."""

    def draft(self, step: int, token: str) -> Draft:
        """Begins a draft or joins it: every rank of a save gives the same token, another save another one."""

    def read_small(self, step: int, name: str, limit_bytes: int) -> bytes | None:
        """A small file of a checkpoint; None where it is missing, no regular file, or larger."""

    def size_bytes(self, step: int, name: str) -> int | None:
        """The size of a file of a checkpoint; None where it is missing or no regular file."""

    def is_whole(self, step: int, name: str, record: FileRecord) -> bool:
        """Whether a file of a checkpoint has the size and the hash of the record."""

    def open(self, step: int, name: str) -> AbstractContextManager[Content]:
        """Opens a file of a checkpoint for reading."""

    def delete(self, step: int) -> None:
        """Deletes a checkpoint, so that half of one never passes for one."""

    def quarantine(self, step: int, reason: str) -> Path | str:
        """Puts a damaged checkpoint out of the way with the reason beside it; returns where it is now."""

    def has_quarantine(self) -> bool:
        """Whether a checkpoint of this run was ever found damaged."""


def is_url(place: str) -> bool:
    """Whether a place is in an object store."""
    return "://" in place


def open_store(place: str) -> Store:
    """Opens the checkpoints of a run folder, or those at the url of an object store.

    Raises:
        CheckpointError: the package for this kind of url is missing.
    """
    if is_url(place):
        from megascale.checkpoint.object_store import ObjectStore  # fsspec, only where it is needed

        return ObjectStore(place)
    from megascale.checkpoint.local_store import LocalStore

    return LocalStore(Path(place))
