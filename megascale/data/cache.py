"""Shards from elsewhere in a folder of this machine, shared by the ranks of a run and by other runs and jobs.

The folder holds `HASH.tar` for a whole shard, `HASH.part` for one that is being fetched, and `lock`. Names are hashes
of the content, so equally named shards of two corpora don't mix.

- A `.part` file is locked by whoever fetches it, for as long as it lives. Its size is set to that of the whole shard
  before the first byte comes, so the sizes of the files in the folder are at all times what the cache takes or has
  promised. One that nobody has locked was left by a killed process and is deleted.
- Sums, deletions for room, and the renaming of a finished `.part` happen under `lock`.
- A shard that is deleted while a process has it mapped stays readable there; its room on the disk comes back when that
  process closes it.
- Nothing is synced to the disk: a shard that a power failure has damaged is found by its size or by the checksums of
  its blocks, and fetched again.
"""

import errno
import fcntl
import mmap
import os
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import BinaryIO, NamedTuple

from megascale.config.data import CacheConfig
from megascale.data.fetch import fetch_verified
from megascale.data.location import local_path
from megascale.data.manifest import ShardInfo
from megascale.data.transfer import Access
from megascale.errors import ConfigError, DataError

GIB = 1 << 30
FULL_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
WAIT_S = 0.05
"""Between two looks whether others have finished their fetches and left room."""


class _Cached(NamedTuple):
    last_used_ns: int
    bytes: int
    path: Path


class ShardCache:
    """Fetches shards into the folder, and deletes those used longest ago when a new one needs their room.

    Args:
        folder: made when it doesn't exist.
        max_bytes: most that the files of the folder take together, those being fetched included.
        access: how to fetch.

    Raises:
        ConfigError: the folder can't be written to.
    """

    def __init__(self, folder: Path, max_bytes: int, access: Access):
        self.folder, self.max_bytes, self._access = folder, max_bytes, access
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._list()
        except OSError as error:
            raise ConfigError(
                f"cache folder {folder} can't be written to ({error.strerror}); give data.cache.folder a folder on "
                "this machine's disk, or hold shards in memory with data.store: ram"
            ) from None

    def path(self, shard: ShardInfo) -> Path:
        """Where a shard lies once it is fetched."""
        return self.folder / f"{shard.sha256}.tar"

    def open(self, place: str, shard: ShardInfo) -> mmap.mmap:
        """Maps a shard into memory, fetched first if need be; waits while another process or thread fetches it.

        Raises:
            DataError: it can't be fetched whole, or the disk is full.
        """
        try:
            while (memory := self._map(shard) or self._fetch(place, shard)) is None:
                pass
        except OSError as error:
            raise self._disk_error(error, shard) from None
        return memory

    def fetch_ahead(self, place: str, shard: ShardInfo, keep: Collection[str], stop: Event) -> None:
        """Fetches a shard, unless another process does so, or room for it would cost one of the hashes in `keep`.

        Raises:
            DataError: it can't be fetched whole, or the disk is full.
            FetchStoppedError: `stop` was set.
        """
        try:
            (self._map(shard) or self._fetch(place, shard, keep, stop))
        except OSError as error:
            raise self._disk_error(error, shard) from None

    def discard(self, shard: ShardInfo) -> None:
        """Deletes a shard that is damaged."""
        self.path(shard).unlink(missing_ok=True)

    def _map(self, shard: ShardInfo) -> mmap.mmap | None:
        """The shard if it is here, and marks it as just used."""
        try:
            with self.path(shard).open("rb") as file:
                if os.fstat(file.fileno()).st_size == shard.bytes:
                    with suppress(PermissionError):  # another user's file: its owner's use alone keeps it young
                        os.utime(file.fileno())
                    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            return None
        self.discard(shard)
        return None

    def _fetch(
        self, place: str, shard: ShardInfo, keep: Collection[str] | None = None, stop: Event | None = None
    ) -> mmap.mmap | None:
        """None where another process was faster, or where a fetch ahead, one with `keep`, stands back."""
        with self._part(shard, waits=keep is None) as part:
            if part is None or not self._reserve(part, shard, keep):
                return None
            fetch_verified(place, part, shard.bytes, shard.sha256, self._access, stop)
            memory = mmap.mmap(part.fileno(), 0, access=mmap.ACCESS_READ)
            with self._locked():
                os.rename(self._part_path(shard), self.path(shard))
            return memory

    def _part_path(self, shard: ShardInfo) -> Path:
        return self.folder / f"{shard.sha256}.part"

    @contextmanager
    def _part(self, shard: ShardInfo, waits: bool) -> Iterator[BinaryIO | None]:
        """The locked `.part` file of a shard; None when another process has it or has just finished with it."""
        path = self._part_path(shard)
        with open(path, "r+b", opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o666)) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
            except BlockingIOError:
                yield None
                return
            try:
                # Whoever held the lock before may have renamed or deleted the file that was opened here.
                yield file if _is_at(path, file) and not self.path(shard).exists() else None
            finally:
                if _is_at(path, file):
                    path.unlink()
                # Closing wouldn't do it: a map keeps its file open, and those who wait would wait for its end.
                fcntl.flock(file, fcntl.LOCK_UN)

    def _reserve(self, part: BinaryIO, shard: ShardInfo, keep: Collection[str] | None) -> bool:
        """Gives the part its size once the budget has room; a fetch ahead doesn't wait for it."""
        part.truncate(0)
        while True:
            with self._locked():
                if self._make_room(shard.bytes, keep or ()):
                    part.truncate(shard.bytes)
                    return True
            if keep is not None:
                return False
            time.sleep(WAIT_S)

    def _make_room(self, num_bytes: int, keep: Collection[str]) -> bool:
        """Deletes the shards used longest ago until there is room, or none if that can't be. Call it locked."""
        taken, cached = self._list()
        excess = taken + num_bytes - self.max_bytes
        victims = sorted(shard for shard in cached if shard.path.stem not in keep)
        if excess > sum(shard.bytes for shard in victims):
            return False
        for shard in victims:
            if excess <= 0:
                break
            shard.path.unlink(missing_ok=True)
            excess -= shard.bytes
        return True

    def _list(self) -> tuple[int, list[_Cached]]:
        """Bytes that the folder takes, and its whole shards. Deletes what killed processes have left."""
        taken, cached = 0, []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):
                if path.suffix == ".tar" or (path.suffix == ".part" and not _delete_abandoned(path)):
                    status = path.stat()
                    taken += status.st_size
                    if path.suffix == ".tar":
                        cached.append(_Cached(status.st_mtime_ns, status.st_size, path))
        return taken, cached

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / "lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _disk_error(self, error: OSError, shard: ShardInfo) -> DataError:
        """The message for a fault of the folder's disk."""
        if error.errno not in FULL_DISK_ERRORS:
            return DataError(f"cache folder {self.folder} can't be used ({error}); mend it or give data.cache.folder")
        return DataError(
            f"no room for a shard of {shard.bytes} bytes in cache folder {self.folder} ({error.strerror}): its disk "
            f"has {shutil.disk_usage(self.folder).free} bytes free, data.cache.max_gib allows {self.max_bytes}; give "
            "data.cache.folder on another disk, a smaller data.cache.max_gib, or hold shards in memory with "
            "data.store: ram"
        )


def _is_at(path: Path, file: BinaryIO) -> bool:
    """Whether a path still names the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _delete_abandoned(path: Path) -> bool:
    """Deletes a `.part` file that nobody has locked: the kernel unlocks those of a process that dies."""
    with path.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        # Under the lock, and only the file that is locked: another one of its name has an owner.
        if _is_at(path, file):
            path.unlink()
    return True


def open_cache(settings: CacheConfig, largest_bytes: int, access: Access) -> ShardCache:
    """The cache that the config asks for.

    Raises:
        ConfigError: it couldn't hold the largest shard, or its folder can't be written to.
    """
    max_bytes = budget_bytes(settings, largest_bytes)
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return ShardCache(local_path(settings.folder or f"{home}/megascale/shards"), max_bytes, access)


def budget_bytes(settings: CacheConfig, largest_bytes: int) -> int:
    """Bytes that the config allows for shards from elsewhere.

    Raises:
        ConfigError: the largest shard doesn't fit.
    """
    max_bytes = int(settings.max_gib * GIB)
    if max_bytes < largest_bytes:
        raise ConfigError(
            f"data.cache.max_gib = {settings.max_gib:g} is {max_bytes} bytes, and the largest shard has "
            f"{largest_bytes}; use {_round_up(largest_bytes / GIB)} or more, better room for a hundred shards"
        )
    return max_bytes


def _round_up(gib: float) -> str:
    """With three digits, and never less."""
    text = f"{gib:.3g}"
    return text if float(text) >= gib else f"{gib * 1.01:.3g}"
