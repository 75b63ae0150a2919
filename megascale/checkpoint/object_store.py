"""Checkpoints in an object store, which has no renames: a checkpoint counts when a small object says so.

    PLACE/checkpoints/step_00000120-<token>/    the files of a checkpoint, or of a draft
    PLACE/committed/step_00000120-<token>       written last, in one request: the checkpoint counts from here on
    PLACE/quarantine/step_00000120-<token>.txt  why that one was found damaged; its files stay where they are

The token is the save's own, so that no other attempt at the same step, not even one of a dead job that comes back, can
overwrite a file of a committed checkpoint. That the marks lie together makes `steps` one request. Repeating requests
that fail is left to the package behind fsspec.
"""

import contextlib
import errno
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from megascale.checkpoint.files import FileRecord
from megascale.checkpoint.folders import CHECKPOINTS, QUARANTINE, step_name
from megascale.config.checkpoint import object_url_problem
from megascale.data.location import scheme_of
from megascale.data.object_store import open_file_system
from megascale.errors import CheckpointError, DataError, redact

COMMITTED = "committed"
README_NAME = "README.txt"
README = """\
Checkpoints of one run of megascale. checkpoints/NAME counts when committed/NAME exists; quarantine/NAME.txt says why
one was found damaged. To use one in a run folder, copy checkpoints/step_N-TOKEN to RUN/checkpoints/step_N.
"""

_NAME = re.compile(r"step_([0-9]{8,18})-[0-9a-z]+")

PART_BYTES = 64 << 20
"""Of an upload, which has at most 10,000 parts; one or two are held in memory."""
SLICE_BYTES = 8 << 20
"""Given to the package at once, which copies it."""
RANGE_BYTES = 16 << 20
RANGES_AT_ONCE = 4
"""Requests in flight for one large read: one connection alone is slower than a disk."""
READ_AHEAD_BYTES = 1 << 20
"""Least that is fetched: about what a connection carries in the time that a request takes."""


def check_url(url: str) -> None:
    """Refuses what checkpoints can't be written to.

    Raises:
        CheckpointError: another kind of url, or one with a password, a query or a pattern in it.
    """
    if problem := object_url_problem(url):
        raise CheckpointError(problem)


class ObjectStore:
    """See `megascale.checkpoint.store.Store`.

    Args:
        place: url of the run's own folder, `SCHEME://BUCKET/FOLDER/RUN_ID`.

    Raises:
        CheckpointError: see `check_url`; or the package for this kind of url is missing.
    """

    def __init__(self, place: str):
        check_url(place)
        self.place = place.rstrip("/")
        self._objects = Objects(self.place)
        self._names: dict[int, str] = {}

    def path(self, step: int) -> str:
        """See `Store`. Asks nobody: with the token where this object has met the checkpoint."""
        return f"{self.place}/{CHECKPOINTS}/{self._names.get(step, step_name(step))}"

    def steps(self) -> list[int]:
        """See `Store`."""
        return sorted({_step_of(name) for name in self._committed()})

    def prepare(self, token: str) -> None:
        """See `Store`. Also writes a small object, so that a store that can't be written to is found at the start."""
        self._objects.put(README_NAME, README.encode())
        drafts = [name for name in self._objects.names(CHECKPOINTS) if _NAME.fullmatch(name)]
        kept = {*self._committed(), *(name.removesuffix(".txt") for name in self._objects.names(QUARANTINE))}
        for name in drafts:
            if name not in kept and not name.endswith(f"-{token}"):
                with contextlib.suppress(OSError):
                    self._objects.remove_folder(f"{CHECKPOINTS}/{name}")

    def free_bytes(self) -> None:
        """See `Store`."""
        return

    def draft(self, step: int, token: str) -> "ObjectDraft":
        """See `Store`."""
        return ObjectDraft(self._objects, f"{step_name(step)}-{token}")

    def read_small(self, step: int, name: str, limit_bytes: int) -> bytes | None:
        """See `Store`."""
        path = self._file(step, name)
        return path and self._objects.read_small(path, limit_bytes)

    def size_bytes(self, step: int, name: str) -> int | None:
        """See `Store`."""
        path = self._file(step, name)
        return path and self._objects.size_bytes(path)

    def is_whole(self, step: int, name: str, record: FileRecord) -> bool:
        """See `Store`."""
        path = self._file(step, name)
        return path is not None and self._objects.is_whole(path, record)

    @contextlib.contextmanager
    def open(self, step: int, name: str) -> Iterator["FetchedFile"]:
        """See `Store`."""
        path = self._file(step, name)
        size_bytes = path and self._objects.size_bytes(path)
        if size_bytes is None:
            raise FileNotFoundError(errno.ENOENT, "no such object", f"{self.path(step)}/{name}")
        yield FetchedFile(self._objects, path, size_bytes)

    def delete(self, step: int) -> None:
        """See `Store`. The mark goes first; files that can't be removed are left to the next save."""
        for name in self._committed():
            if _step_of(name) == step:
                _remove(self._objects, name)

    def quarantine(self, step: int, reason: str) -> str:
        """See `Store`. The files aren't copied: the reason is put down, then the mark removed."""
        name = self._name(step)
        if name is not None:
            self._objects.put(f"{QUARANTINE}/{name}.txt", f"{reason}\n".encode())
            self._objects.remove(f"{COMMITTED}/{name}")
        return self.path(step)

    def has_quarantine(self) -> bool:
        """See `Store`."""
        return bool(self._objects.names(QUARANTINE))

    def _committed(self) -> list[str]:
        return sorted(filter(_NAME.fullmatch, self._objects.names(COMMITTED)))

    def _name(self, step: int) -> str | None:
        """The committed one of a step. Two are only there when a dead job came back; then all take the same."""
        name = next((name for name in self._committed() if _step_of(name) == step), None)
        if name is not None:
            self._names[step] = name
        return name

    def _file(self, step: int, name: str) -> str | None:
        folder = self._name(step)
        return folder and f"{CHECKPOINTS}/{folder}/{name}"


@dataclass(frozen=True)
class ObjectDraft:
    """See `megascale.checkpoint.store.Draft`.

    Attributes:
        objects: of the run.
        name: of the checkpoint, with the token.
    """

    objects: "Objects"
    name: str

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> FileRecord:
        """See `Draft`."""
        return self.objects.write(self._path(name), chunks)

    def is_whole(self, name: str, record: FileRecord) -> bool:
        """See `Draft`."""
        return self.objects.is_whole(self._path(name), record)

    def read_small(self, name: str, limit_bytes: int) -> bytes | None:
        """See `Draft`."""
        return self.objects.read_small(self._path(name), limit_bytes)

    def stored_bytes(self) -> int:
        """See `Draft`."""
        return 0

    def remove(self, name: str) -> None:
        """See `Draft`."""
        self.objects.remove(self._path(name))

    def seal(self) -> None:
        """See `Draft`. An object has its name as soon as it has its content."""

    def commit(self) -> None:
        """See `Draft`."""
        self.objects.put(f"{COMMITTED}/{self.name}", f"{self.name}\n".encode())

    def abandon(self) -> None:
        """See `Draft`. A commit may have been carried out though its answer was lost: so the mark goes first here too,
        and while that can't be said to be gone the files stay.
        """
        with contextlib.suppress(OSError):
            _remove(self.objects, self.name)

    def _path(self, name: str) -> str:
        return f"{CHECKPOINTS}/{self.name}/{name}"


class FetchedFile:
    """See `megascale.checkpoint.store.Content`. What follows a small read is fetched with it, and kept until the next.
    """

    def __init__(self, objects: "Objects", path: str, size_bytes: int):
        self.size_bytes = size_bytes
        self._objects, self._path = objects, path
        self._start, self._fetched = 0, memoryview(b"")

    def read(self, start: int, stop: int) -> memoryview:
        """See `Content`."""
        stop = min(stop, self.size_bytes)
        if start >= stop:
            return memoryview(b"")
        if start < self._start or stop > self._start + len(self._fetched):
            self._fetched = memoryview(b"")  # so that two large ones aren't held at once
            self._fetched = self._objects.read(
                self._path, start, min(max(stop, start + READ_AHEAD_BYTES), self.size_bytes)
            )
            self._start = start
        return self._fetched[start - self._start: stop - self._start]


class Objects:
    """The objects below one url, by their path from there; whatever fails is an OSError that names the object.

    The error numbers tell what is missing and what is refused. Any other failure has none: it says nothing about the
    checkpoint, and must not pass for the EIO with which a disk reports a damaged file.
    """

    def __init__(self, place: str):
        self._place = place
        try:
            self._system = open_file_system(scheme_of(place))
        except DataError as error:
            raise CheckpointError(error) from None

    def names(self, folder: str) -> list[str]:
        """The names in a folder, asked anew each time; none where there is no such folder."""
        try:
            return [path.rstrip("/").rpartition("/")[2] for path in self._fresh("ls", folder, detail=False)]
        except FileNotFoundError:
            return []

    def size_bytes(self, path: str) -> int | None:
        """Size of an object, None where there is none."""
        try:
            info = self._fresh("info", path)
        except FileNotFoundError:
            return None
        return info["size"] if info["type"] == "file" else None

    def read_small(self, path: str, limit_bytes: int) -> bytes | None:
        """A small object whole; None where it is missing or larger."""
        size_bytes = self.size_bytes(path)
        if size_bytes is None or size_bytes > limit_bytes:
            return None
        return bytes(self.read(path, 0, size_bytes))

    def read(self, path: str, start: int, stop: int) -> memoryview:
        """The bytes [start, stop), of which a few ranges are fetched at a time."""
        content = memoryview(bytearray(stop - start))
        for first in range(start, stop, RANGES_AT_ONCE * RANGE_BYTES):
            starts = range(first, min(first + RANGES_AT_ONCE * RANGE_BYTES, stop), RANGE_BYTES)
            stops = [min(begin + RANGE_BYTES, stop) for begin in starts]
            url = self._url(path)
            parts = self._call(path, self._system.cat_ranges, [url] * len(stops), list(starts), stops, on_error="raise")
            for begin, end, part in zip(starts, stops, parts, strict=True):
                if len(part) != end - begin:
                    raise OSError(f"{url}: gave {len(part)} bytes for [{begin}, {end})")
                content[begin - start: end - start] = part
        return content

    def is_whole(self, path: str, record: FileRecord) -> bool:
        """Whether an object has the size and the hash of the record."""
        if self.size_bytes(path) != record.bytes:
            return False
        digest, step = hashlib.sha256(), RANGES_AT_ONCE * RANGE_BYTES
        for start in range(0, record.bytes, step):
            digest.update(self.read(path, start, min(start + step, record.bytes)))
        return digest.hexdigest() == record.sha256

    def put(self, path: str, content: bytes) -> None:
        """Writes a small object in one request: whole, or not at all."""
        self._call(path, self._system.pipe_file, self._url(path), content)

    def write(self, path: str, chunks: Iterable[bytes | memoryview]) -> FileRecord:
        """Uploads an object part by part, hashing on the way; it is stored when this returns.

        One that fails midway is closed all the same, which leaves a cut object and no parts that nobody lists.
        """
        digest, size_bytes = hashlib.sha256(), 0
        file = self._call(path, self._system.open, self._url(path), "wb", block_size=PART_BYTES)
        try:
            for chunk in chunks:
                rest = memoryview(chunk).cast("B")
                size_bytes += len(rest)
                digest.update(rest)
                while rest:
                    self._call(path, file.write, rest[:SLICE_BYTES])
                    rest = rest[SLICE_BYTES:]
        except BaseException:
            with contextlib.suppress(OSError):
                self._call(path, file.close)
            raise
        self._call(path, file.close)
        return FileRecord(bytes=size_bytes, sha256=digest.hexdigest())

    def remove(self, path: str) -> None:
        """Removes an object, or makes sure that it is gone."""
        with contextlib.suppress(FileNotFoundError):
            self._call(path, self._system.rm_file, self._url(path))

    def remove_folder(self, path: str) -> None:
        """Removes the objects below a path, as far as the store does so."""
        if paths := self._fresh("find", path):
            self._call(path, self._system.rm, list(paths))

    def _url(self, path: str) -> str:
        return f"{self._place}/{path}"

    def _fresh(self, method: str, path: str, **options: Any) -> Any:
        """Asks the store itself: a listing that was kept doesn't show what other processes did."""
        self._system.invalidate_cache()
        return self._call(path, getattr(self._system, method), self._url(path), **options)

    def _call(self, path: str, function: Callable, *args: Any, **options: Any) -> Any:
        url = self._url(path)
        try:
            return function(*args, **options)
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "no such object, or no such bucket", url) from None
        except PermissionError as error:
            raise PermissionError(errno.EACCES, redact(f"access refused ({error})"), url) from None
        except Exception as error:
            raise OSError(redact(f"{url}: {type(error).__name__}: {error}")) from None


def _remove(objects: Objects, name: str) -> None:
    """Removes a checkpoint, its mark first; raises where the mark may be left, and then leaves the files too."""
    objects.remove(f"{COMMITTED}/{name}")
    with contextlib.suppress(OSError):
        objects.remove_folder(f"{CHECKPOINTS}/{name}")


def _step_of(name: str) -> int:
    return int(_NAME.fullmatch(name)[1])
