"""`megascale logs`: what a rank of a launched run has said, over restarts, and what went wrong first."""

import os
import re
import select
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from launcher.status import Standing, check_run_folder, read_status
from launcher.supervise.first_error import FIRST_ERROR_FILE
from launcher.supervise.hang_report import REPORT_FILE
from launcher.supervise.records import LOGS_FOLDER, read_state
from megascale.errors import LaunchError

POLL_S = 0.5
ASK_S = 3.0
"""Between two looks at whether the run goes on, while its log says nothing."""
BLOCK_BYTES = 1 << 16
_ATTEMPT = re.compile(r"attempt_(\d+)")


def show_log(run: Path, rank: int, attempt: str | None, lines: int, *, follows: bool) -> None:
    """Prints the end of a rank's log, and what comes after it until the run ends.

    Args:
        attempt: `LIFE/K`; None is the newest, and whatever follows it.
        lines: last lines to begin with, 0 for all.

    Raises:
        CheckpointError, LaunchError: there is no such run, attempt or log.
    """
    check_run_folder(run)
    folder = choose_attempt(run, attempt)
    log = log_of(folder, rank)
    if not log.exists() and not follows:
        raise LaunchError(f"{log}: no such file; {describe_logs(folder)}")
    try:
        if follows:
            _follow(run, rank, folder, lines, stays=attempt is not None)
        else:
            _write(tail(log, lines))
    except BrokenPipeError:
        _forget_output()


def show_errors(run: Path, attempt: str | None) -> None:
    """Prints the first error or the hang report of an attempt; by default of the newest one that has any.

    Raises:
        CheckpointError, LaunchError: there is no such run or attempt.
    """
    check_run_folder(run)
    folders = [choose_attempt(run, attempt)] if attempt else list_attempts(run)[::-1]
    for folder in folders:
        texts = [(folder / name).read_bytes() for name in (FIRST_ERROR_FILE, REPORT_FILE) if (folder / name).exists()]
        if texts:
            try:
                _write(f"attempt {name_of(folder)}:\n".encode() + b"\n".join(texts))
            except BrokenPipeError:
                _forget_output()
            return
    what = f"attempt {attempt}" if attempt else f"any of {len(folders)} attempts"
    print(f"{run}: no error is recorded of {what}")


def list_attempts(run: Path) -> list[Path]:
    """The folders of all attempts, oldest first."""
    state, found = read_state(run), []
    for folder in (run / LOGS_FOLDER).glob("*/attempt_*"):
        match = _ATTEMPT.fullmatch(folder.name)
        if match and folder.is_dir():
            is_newest_life = state is not None and folder.parent.name == state.life
            found.append((is_newest_life, folder.parent.stat().st_mtime, int(match[1]), folder))
    return [folder for *_, folder in sorted(found)]


def choose_attempt(run: Path, attempt: str | None) -> Path:
    """The folder of an attempt, by default of the newest.

    Raises:
        LaunchError: there is none; the message lists those that are.
    """
    folders = list_attempts(run)
    if not folders:
        raise LaunchError(
            f"{run}: has no logs of ranks: either no attempt has begun (`megascale status {run}`), or it was started by"
            " `megascale train`, which leaves its words to its terminal; `megascale launch local` keeps them"
        )
    if attempt is None:
        return folders[-1]
    for folder in folders:
        if name_of(folder) == attempt:
            return folder
    raise LaunchError(f"--attempt {attempt}: no such attempt; there are {', '.join(map(name_of, folders[-10:]))}")


def name_of(folder: Path) -> str:
    """An attempt as people write it: `LIFE/K`."""
    return f"{folder.parent.name}/{folder.name.removeprefix('attempt_')}"


def log_of(folder: Path, rank: int) -> Path:
    """The file with a rank's words."""
    return folder / f"rank_{rank:05d}.log"


def describe_logs(folder: Path) -> str:
    """Whose logs an attempt has, in words."""
    ranks = [int(path.stem[5:]) for path in folder.glob("rank_*.log") if path.stem[5:].isdigit()]
    return f"attempt {name_of(folder)} has logs of ranks {min(ranks)} to {max(ranks)}" if ranks else \
        f"attempt {name_of(folder)} has no logs yet"


def tail(path: Path, lines: int) -> bytes:
    """The last lines of a file, read from its end; all of it for 0."""
    with path.open("rb") as file:
        if not lines:
            return file.read()
        place, text = file.seek(0, os.SEEK_END), b""
        while place and text.rstrip(b"\n").count(b"\n") < lines:
            size = min(BLOCK_BYTES, place)
            place = file.seek(place - size)
            text = file.read(size) + text
            file.seek(place)
    return b"".join(text.splitlines(keepends=True)[-lines:])


def _follow(run: Path, rank: int, folder: Path, lines: int, *, stays: bool) -> None:
    """Prints a log as it grows, then those of the attempts that come after it."""
    while True:
        _write(f"--- attempt {name_of(folder)}, rank {rank}\n".encode())

        def is_over(folder: Path = folder) -> bool:
            return bool(not stays and _later(run, folder)) or not _goes_on(run)

        for text in _read_growing(log_of(folder, rank), lines, is_over):
            _write(text)
        later = _later(run, folder)
        if stays or not later:
            return
        folder, lines = later[0], 0


def _later(run: Path, folder: Path) -> list[Path]:
    folders = list_attempts(run)
    return folders[folders.index(folder) + 1 :] if folder in folders else []


def _read_growing(path: Path, lines: int, is_over: Callable[[], bool]) -> Iterator[bytes]:
    """Yields the end of a file and then what is added to it, until `is_over` and all of it was read."""
    place, asked_s = None, time.monotonic()
    while True:
        is_last = False
        if time.monotonic() - asked_s > ASK_S:  # before it reads, so that nothing can be added in between
            is_last, asked_s = is_over(), time.monotonic()
        text = b""
        if place is None and path.exists():
            text = tail(path, lines)
            place = path.stat().st_size
        elif place is not None:
            with path.open("rb") as file:
                file.seek(place)
                text = file.read()
            place += len(text)
        if text:
            yield text
        if is_last:
            return
        _check_reader()
        time.sleep(POLL_S)


def _goes_on(run: Path) -> bool:
    return read_status(run).standing in (Standing.RUNNING, Standing.WAITING)


def _write(text: bytes) -> None:
    sys.stdout.flush()
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()


def _check_reader() -> None:
    """Notices that the reader of a pipe is gone though there is nothing to write."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        raise BrokenPipeError


def _forget_output() -> None:
    """What is still buffered for a reader that is gone must not raise at the interpreter's end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
