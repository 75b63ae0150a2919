"""What is asked of a run from outside, by a signal or by a file in its folder; all ranks agree on it between two steps.

    RUN/STOP    save, and stop; stays, so that the run stops again until somebody removes it
    RUN/SAVE    save, and go on; removed when that save begins
"""

import contextlib
import os
import signal
import time
from pathlib import Path

from megascale.parallel.orphan import signal_when_parent_dies

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What schedulers and terminals send: SIGTERM before killing, Ctrl-C, and SLURM's early warning."""
STOP_FILE = "STOP"
SAVE_FILE = "SAVE"
LOOK_INTERVAL_S = 1.0
"""Between two looks at the files: a shared folder isn't asked in every step."""


class StopRequest:
    """Whether this process was asked to stop or to save. One rank asked is enough: the loop sums over all ranks.

    Attributes:
        is_set: whether to stop.
        is_save_asked: whether to save and go on.
    """

    def __init__(self) -> None:
        self.is_set = self.is_save_asked = False
        self._first_s, self._next_look_s = 0.0, float("inf")
        self._folder = Path()

    def watch(self) -> None:
        """From here on a stop signal only sets the flag."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def look_in(self, folder: Path) -> None:
        """From here on `look` looks in this run folder."""
        self._folder, self._next_look_s = folder, 0.0

    def look(self) -> None:
        """Looks for the files, at most once a second. Cost: two calls of stat then, a read of the clock else."""
        now_s = time.monotonic()
        if now_s < self._next_look_s:
            return
        self._next_look_s = now_s + LOOK_INTERVAL_S
        if self.is_stop_file_there():
            self._note()
        self.is_save_asked = os.path.exists(self._folder / SAVE_FILE)

    def is_stop_file_there(self) -> bool:
        """Whether the run folder has the file that stops it; not where the folder can't be reached."""
        return os.path.exists(self._folder / STOP_FILE)

    def clear_save(self, *, removes: bool) -> None:
        """The save that was asked for begins; one rank removes the file."""
        self.is_save_asked = False
        if removes:
            with contextlib.suppress(OSError):
                os.unlink(self._folder / SAVE_FILE)

    def deadline_s(self, grace_s: float) -> float | None:
        """Until when, by `time.monotonic`, what was asked for must be done; None while nothing limits it."""
        return self._first_s + grace_s if self.is_set and grace_s else None

    def _note(self, number: int = 0, frame: object = None) -> None:
        if not self.is_set:
            self._first_s = time.monotonic()
        self.is_set = True


def stop_when_parent_dies() -> None:
    """Asks Linux to send SIGTERM when the launcher is gone, so that no rank is orphaned; elsewhere does nothing."""
    signal_when_parent_dies(signal.SIGTERM)
