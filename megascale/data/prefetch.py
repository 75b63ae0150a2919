"""Makes the next items of an iterator in a thread while the consumer works on the last one."""

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Generic, Self, TypeVar

T = TypeVar("T")
CLOSE_S = 5.0
"""How long `close` waits for the thread: one that hangs in a read that never ends mustn't keep the run from ending."""


class Prefetched(Iterator[T], Generic[T]):
    """Yields `items` in their order, up to `depth` of them made ahead.

    An error of `items` is raised in the consumer, after the items before it. Close this to end the thread.
    """

    def __init__(self, items: Iterator[T], depth: int):
        self._ready: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(depth)
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._produce, args=(items,), name="megascale-prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        return self._take(None)

    def take(self, timeout_s: float) -> T | None:
        """The next item, or None when it isn't made within so many seconds.

        Raises:
            StopIteration: there is none any more.
        """
        try:
            return self._take(timeout_s)
        except queue.Empty:
            return None

    def close(self) -> None:
        """Ends the thread, unless it hangs in the making of an item: then it is left behind after `CLOSE_S`."""
        self._is_stopped.set()
        deadline = time.monotonic() + CLOSE_S
        # Room in the queue lets a waiting `put` return; the thread then sees the event.
        while self._thread.is_alive() and time.monotonic() < deadline:
            with suppress(queue.Empty):
                self._ready.get(timeout=0.01)

    def _take(self, timeout_s: float | None) -> T:
        if self._is_stopped.is_set():
            raise StopIteration
        kind, value = self._ready.get(timeout=timeout_s)
        if kind == "item":
            return value
        self.close()
        raise StopIteration if kind == "end" else value

    def _produce(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                self._ready.put(("item", item))
                if self._is_stopped.is_set():
                    return
            self._ready.put(("end", None))
        except BaseException as error:
            self._ready.put(("error", error))
