"""Progress of long work over bytes: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

LINE_INTERVAL_S = 10.0


@contextmanager
def track_bytes(console: Console, title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Shows progress while the body runs; the body calls the function it is given with the bytes done since."""
    if console.is_terminal:
        columns = (TextColumn(f"{title:<16}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
            task = progress.add_task(title, total=total_bytes)
            yield lambda size: progress.advance(task, size)
            progress.update(task, completed=total_bytes)
        return
    lines = ProgressLines(console, title, total_bytes)
    yield lines.advance
    lines.finish()


class ProgressLines:
    """Progress as a line every few seconds, for logs."""

    def __init__(self, console: Console, title: str, total_bytes: int):
        self._console, self._title, self._total_bytes = console, title, total_bytes
        self._done_bytes, self._start_s = 0, time.monotonic()
        self._last_line_s = self._start_s

    def advance(self, size: int) -> None:
        self._done_bytes += size
        if time.monotonic() - self._last_line_s >= LINE_INTERVAL_S:
            self._last_line_s = time.monotonic()
            fraction = self._done_bytes / max(1, self._total_bytes)
            self._console.print(f"{self._title}: {fraction:.0%} of {self._total_bytes / 1e6:.1f} MB", highlight=False)

    def finish(self) -> None:
        elapsed_s = time.monotonic() - self._start_s
        self._console.print(f"{self._title}: {self._total_bytes / 1e6:.1f} MB in {elapsed_s:.1f} s", highlight=False)
