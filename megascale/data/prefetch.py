"""Makes the next items of an iterator in a thread while the consumer works on the last one."""

import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any


def prefetch(items: Iterator, depth: int) -> Iterator:
    """Yields `items` in their order, up to `depth` of them made ahead.

    An error of `items` is raised in the consumer, after the items before it. When the consumer stops, by an error or
    by closing this generator, the thread ends before `close` returns.
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    is_stopped = threading.Event()

    def produce() -> None:
        try:
            for item in items:
                ready.put(("item", item))
                if is_stopped.is_set():
                    return
            ready.put(("end", None))
        except BaseException as error:
            ready.put(("error", error))

    thread = threading.Thread(target=produce, name="megascale-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        is_stopped.set()
        # Room in the queue lets a waiting `put` return; the thread then sees the event.
        while thread.is_alive():
            with suppress(queue.Empty):
                ready.get(timeout=0.01)
        thread.join()
