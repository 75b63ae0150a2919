"""Faults of the file system: counts every changing call of `os`, and does something at the one that is asked for."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from unittest import mock

CHANGING_CALLS = ("open", "write", "fsync", "close", "rename", "mkdir", "unlink", "rmdir", "pwrite", "ftruncate")


class Killed(BaseException):
    """Ends one simulated rank at once, as SIGKILL would."""


class FileCalls:
    """Counts calls of the watched threads and runs `fault(name, real, args)` in place of call number `at`.

    The thread pool of `run_ranks` names its threads `..._<rank>`; `rank` narrows the watch to one of them.
    """

    def __init__(self, at: int, fault: Callable, rank: int | None = None):
        self.count, self.names = 0, []
        self._at, self._fault, self._rank, self._guard = at, fault, rank, threading.Lock()

    def call(self, name: str, real: Callable, args: tuple, kwargs: dict):
        if self._rank is not None and not threading.current_thread().name.endswith(f"_{self._rank}"):
            return real(*args, **kwargs)
        with self._guard:
            self.count += 1
            number = self.count
            self.names.append(name)
        return self._fault(name, real, args, kwargs) if number == self._at else real(*args, **kwargs)


@contextlib.contextmanager
def watched_files(calls: FileCalls) -> Iterator[FileCalls]:
    """Sends the changing calls of `os` through `calls`."""
    with contextlib.ExitStack() as stack:
        for name in CHANGING_CALLS:
            real = getattr(os, name)
            stack.enter_context(mock.patch.object(os, name, _through(calls, name, real)))
        yield calls


def _through(calls: FileCalls, name: str, real: Callable) -> Callable:
    return lambda *args, **kwargs: calls.call(name, real, args, kwargs)


def fail_with(code: int) -> Callable:
    """A fault: the call fails with this error number; a close still closes, as Linux does."""

    def fault(name: str, real: Callable, args: tuple, kwargs: dict):
        if name == "close":
            real(*args, **kwargs)
        raise OSError(code, os.strerror(code))

    return fault


def after_half(ending: Callable[[], None]) -> Callable:
    """A fault: half of what a write was given is written, then `ending` happens; other calls don't happen at all."""

    def fault(name: str, real: Callable, args: tuple, kwargs: dict):
        if name == "write":
            real(args[0], args[1][: len(args[1]) // 2])
        ending()

    return fault


def run_forked(body: Callable[[], None]) -> int:
    """Runs the body in a child process and returns its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            body()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
