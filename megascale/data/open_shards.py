"""The open shards of a store, bounded, and the thread that fetches the next ones. Without knowledge of where from."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import islice
from threading import Condition, Event, Lock, Thread

from megascale.data.shards import Shard

CLOSE_WAIT_S = 2.0
"""For a thread in the middle of a read, which can't be interrupted; it ends after that read, or with the process."""


class OpenShards:
    """Opens each shard once, however many threads ask for it, and closes those used longest ago.

    Args:
        load: opens a shard; the event tells it to give up.
        cost: of a shard, in the unit of `most`.
        most: sum of the costs of the shards kept open. Someone who still holds a closed shard can go on reading it.
    """

    def __init__(self, load: Callable[[int, Event | None], Shard], cost: Callable[[int], int], most: int):
        self._load, self._cost, self._most = load, cost, most
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._loading: dict[int, Lock] = {}
        self._taken, self._guard = 0, Lock()

    def __contains__(self, shard: int) -> bool:
        return shard in self._open

    def get(self, shard: int, stop: Event | None = None) -> Shard:
        """The shard; waits while another thread opens it. Errors are those of `load`."""
        if (opened := self._find(shard)) is not None:
            return opened
        with self._guard:
            loading = self._loading.setdefault(shard, Lock())
        with loading:
            if (opened := self._find(shard)) is not None:
                return opened
            return self._open_now(shard, stop)

    def has_room(self, shard: int, keep: Collection[int]) -> bool:
        """Whether a shard would fit without closing one of `keep`."""
        with self._guard:
            fixed = sum(self._cost(kept) for kept in keep if kept in self._open)
        return fixed + self._cost(shard) <= self._most

    def drop(self, shard: int) -> None:
        """Closes a shard."""
        with self._guard:
            if self._open.pop(shard, None) is not None:
                self._taken -= self._cost(shard)

    def _find(self, shard: int) -> Shard | None:
        with self._guard:
            if shard in self._open:
                self._open.move_to_end(shard)
            return self._open.get(shard)

    def _open_now(self, shard: int, stop: Event | None) -> Shard:
        cost = self._cost(shard)
        with self._guard:
            self._taken += cost
            while self._taken > self._most and self._open:
                oldest, _ = self._open.popitem(last=False)
                self._taken -= self._cost(oldest)
        try:
            opened = self._load(shard, stop)
        except BaseException:
            with self._guard:
                self._taken -= cost
            raise
        finally:
            with self._guard:
                self._loading.pop(shard, None)
        with self._guard:
            self._open[shard] = opened
        return opened


class FetchThread:
    """A thread that fetches the shards of the last hint, one after the other. It starts with the first hint.

    Args:
        fetch: fetches a shard, given those of the hint that come before it; the event tells it to give up.
        most: shards of a hint that are fetched.
    """

    def __init__(self, fetch: Callable[[int, Sequence[int], Event], None], most: int):
        self._fetch, self._most = fetch, most
        self._hint: list[int] = []
        self._next = 0
        self._stop, self._changed = Event(), Condition()
        self._thread = Thread(target=self._run, name="megascale-fetch", daemon=True)

    def want(self, shards: Iterable[int]) -> None:
        """Replaces the hint."""
        hint = list(islice(dict.fromkeys(shards), self._most))
        with self._changed:
            if hint == self._hint or self._stop.is_set():
                return
            self._hint, self._next = hint, 0
            self._changed.notify()
            if not self._thread.is_alive():
                self._thread.start()

    def close(self) -> None:
        """Ends the thread, and the fetch that it is at."""
        self._stop.set()
        with self._changed:
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(CLOSE_WAIT_S)

    def _run(self) -> None:
        while (work := self._take()) is not None:
            shard, before = work
            try:
                self._fetch(shard, before, self._stop)
            except Exception:
                # Whoever opens the shard tries again, and gets the error.
                continue

    def _take(self) -> tuple[int, list[int]] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._next < len(self._hint) or self._stop.is_set())
            if self._stop.is_set():
                return None
            self._next += 1
            return self._hint[self._next - 1], self._hint[: self._next - 1]
