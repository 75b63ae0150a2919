"""Where the shards of a split are opened: in place, through the node's cache, or in memory. Same arrays from each."""

import io
import mmap
from collections.abc import Iterable, Sequence
from threading import Event
from typing import Protocol

from megascale.config.data import DataConfig
from megascale.data.cache import ShardCache, budget_bytes, open_cache
from megascale.data.fetch import fetch_verified
from megascale.data.location import is_local
from megascale.data.manifest import Manifest
from megascale.data.open_shards import FetchThread, OpenShards
from megascale.data.shards import Shard, map_shard
from megascale.data.transfer import Access, access_of
from megascale.errors import DataError

MAX_OPEN = 256
"""Shards that a store keeps mapped: two for each lane of a run with the default 64, twice over."""


class ShardStore(Protocol):
    """The shards of a split. May be used by several threads."""

    def open(self, shard: int) -> Shard:
        """Gives the shard at a position of the table.

        Raises:
            DataError: it is missing, can't be fetched whole, or is damaged.
        """

    def prefetch(self, shards: Iterable[int]) -> None:
        """Hints at the shards needed soon, in the order of their first use. The last hint counts."""

    def renew(self, shard: int) -> bool:
        """Drops the copy of a shard that turned out damaged; whether opening it again, once, may give a better one."""

    def close(self) -> None:
        """Ends the thread that fetches ahead."""


def open_store(manifest: Manifest, data: DataConfig) -> ShardStore:
    """The store that the config asks for.

    Raises:
        ConfigError: its budget is smaller than a shard, or the cache folder can't be written to.
    """
    access, largest_bytes = access_of(data), int(manifest.table["bytes"].max())
    if data.store == "ram":
        return RamStore(manifest, access, budget_bytes(data.cache, largest_bytes), data.cache.shards_ahead)
    if is_local(manifest.folder):
        return MapStore(manifest)
    return CacheStore(manifest, open_cache(data.cache, largest_bytes, access), data.cache.shards_ahead)


class MapStore:
    """Local shards, mapped where they lie."""

    def __init__(self, manifest: Manifest, max_open: int = MAX_OPEN):
        self.open = OpenShards(lambda shard, stop: map_shard(manifest, shard), lambda shard: 1, max_open).get

    def prefetch(self, shards: Iterable[int]) -> None:
        """Nothing: the system reads ahead."""

    def renew(self, shard: int) -> bool:
        """No: the file itself is damaged."""
        return False

    def close(self) -> None:
        """Nothing runs."""


class CacheStore:
    """Shards from elsewhere, mapped from the node's cache.

    Args:
        manifest: the split.
        cache: fetches and keeps them.
        shards_ahead: most that are fetched ahead of use.
    """

    def __init__(self, manifest: Manifest, cache: ShardCache, shards_ahead: int):
        self._manifest, self._cache, self._renewed = manifest, cache, set()
        self._shards = OpenShards(self._load, lambda shard: 1, MAX_OPEN)
        self._thread = FetchThread(self._fetch_ahead, shards_ahead)
        self.open, self.close = self._shards.get, self._thread.close

    def prefetch(self, shards: Iterable[int]) -> None:
        """Fetches those that aren't open into the cache."""
        self._thread.want(shard for shard in shards if shard not in self._shards)

    def renew(self, shard: int) -> bool:
        """Yes, once for each shard: its cached copy is deleted."""
        if shard in self._renewed:
            return False
        self._renewed.add(shard)
        self._shards.drop(shard)
        self._cache.discard(self._manifest.shard(shard))
        return True

    def _load(self, shard: int, stop: Event | None = None) -> Shard:
        memory = self._fetch(shard)
        try:
            return self._view(shard, memory)
        except DataError:
            # The file in the cache may have gone bad, in which case the one at the source is good.
            if not self.renew(shard):
                raise
            return self._view(shard, self._fetch(shard))

    def _fetch(self, shard: int) -> mmap.mmap:
        return self._cache.open(self._manifest.shard_place(shard), self._manifest.shard(shard))

    def _view(self, shard: int, memory: mmap.mmap) -> Shard:
        path = self._cache.path(self._manifest.shard(shard))
        return Shard(self._manifest, shard, memory, f"{self._manifest.shard_place(shard)} (cached as {path})")

    def _fetch_ahead(self, shard: int, before: Sequence[int], stop: Event) -> None:
        keep = {self._manifest.shard(earlier).sha256 for earlier in before}
        self._cache.fetch_ahead(self._manifest.shard_place(shard), self._manifest.shard(shard), keep, stop)


class RamStore:
    """Whole shards in memory, verified, for machines without a disk.

    Args:
        manifest: the split.
        access: how to fetch.
        max_bytes: most that the shards take; those used longest ago are dropped.
        shards_ahead: most that are fetched ahead of use.
    """

    def __init__(self, manifest: Manifest, access: Access, max_bytes: int, shards_ahead: int):
        self._manifest, self._access = manifest, access
        self._shards = OpenShards(self._load, lambda shard: int(manifest.table["bytes"][shard]), max_bytes)
        self._thread = FetchThread(self._fetch_ahead, shards_ahead)
        self.open, self.close = self._shards.get, self._thread.close

    def prefetch(self, shards: Iterable[int]) -> None:
        """Fetches those that aren't here, as far as they fit."""
        self._thread.want(shard for shard in shards if shard not in self._shards)

    def renew(self, shard: int) -> bool:
        """No: its hash was checked."""
        return False

    def _load(self, shard: int, stop: Event | None = None) -> Shard:
        info, buffer = self._manifest.shard(shard), io.BytesIO()
        fetch_verified(self._manifest.shard_place(shard), buffer, info.bytes, info.sha256, self._access, stop)
        return Shard(self._manifest, shard, buffer.getvalue())

    def _fetch_ahead(self, shard: int, before: Sequence[int], stop: Event) -> None:
        if self._shards.has_room(shard, before):
            self._shards.get(shard, stop)
