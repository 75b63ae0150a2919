"""Reading and writing of the run folder beside the controller's work.

The run folder lies on a shared file system, which may not answer for a minute. The controller must go on meanwhile:
agents that hear nothing from it end their ranks.
"""

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


class Scribe:
    """A thread that does what it was given last, under each name; what came before and wasn't begun is dropped."""

    def __init__(self) -> None:
        self._waiting: dict[str, Callable[[], None]] = {}
        self._has_work = threading.Condition()
        self._is_idle = True
        self._thread = threading.Thread(target=self._work, name="megascale-scribe", daemon=True)
        self._thread.start()

    def post(self, name: str, work: Callable[[], None]) -> None:
        """Has something done, in place of what waits under this name."""
        with self._has_work:
            self._waiting[name] = work
            self._has_work.notify_all()

    def finish(self, timeout_s: float) -> bool:
        """Waits until all is done; False when the file system took longer."""
        with self._has_work:
            return self._has_work.wait_for(lambda: self._is_idle and not self._waiting, timeout_s)

    def _work(self) -> None:
        while True:
            with self._has_work:
                self._is_idle = True
                self._has_work.notify_all()
                self._has_work.wait_for(lambda: self._waiting)
                self._is_idle = False
                name = next(iter(self._waiting))
                work = self._waiting.pop(name)
            with suppress(OSError):  # a full or absent disk: the next one may work
                work()


class Follower:
    """Copies a growing file to standard output; a reader that is gone stops nothing."""

    def __init__(self, path: Path):
        self._path, self._offset = path, 0

    def pass_on(self) -> None:
        """Copies what is new."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                content = file.read()
        except OSError:
            return
        self._offset += len(content)
        if content:
            with suppress(OSError, ValueError):
                os.write(sys.stdout.fileno(), content)
