"""Faults of single system calls in a running process: strace numbers its calls and spoils the one asked for."""

import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STRACE = shutil.which("strace")
INJECTED = "(INJECTED)"
_CALL = re.compile(r"([a-z0-9_]+)\((.*)")


@dataclass(frozen=True)
class Call:
    """A system call: its kind, its number among the calls of that kind from 1, and what strace printed of it."""

    kind: str
    number: int
    text: str


@contextmanager
def traced(pid: int, log: Path, fault: str | None = None) -> Iterator[None]:
    """Numbers the file calls of a process from now on; it has one thread, which waits for something to read.

    Args:
        log: where strace writes them, complete after the block.
        fault: as `kill_at` and `fail_at` give it; None only counts.
    """
    injection = [] if fault is None else ["-e", f"inject={fault}"]
    strace = subprocess.Popen(
        [STRACE, "-y", "-s", "0", "-e", "signal=none", "-e", "trace=%file,%desc", *injection, "-o", str(log),
         "-p", str(pid)], stderr=subprocess.PIPE, text=True,
    )
    try:
        greeting = strace.stderr.readline()
        assert "attached" in greeting, greeting
        while not re.search(r"^State:\tS", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE):
            time.sleep(0.001)  # till it has begun to read again, which is call 1
        yield
    finally:
        strace.terminate()  # lets the process go
        strace.communicate()


def kill_at(call: Call) -> str:
    """The fault that kills the process when it is about to make a call."""
    return f"{call.kind}:signal=SIGKILL:when={call.number}"


def fail_at(call: Call, error: str) -> str:
    """The fault of a call that fails with an error, such as ENOSPC, and isn't carried out."""
    return f"{call.kind}:error={error}:when={call.number}"


def read_calls(log: Path) -> list[Call]:
    """All calls of a log, in order."""
    counts, calls = Counter(), []
    for match in map(_CALL.match, log.read_text().splitlines()):
        if match is not None:
            kind, text = match.groups()
            counts[kind] += 1
            calls.append(Call(kind, counts[kind], text))
    return calls
