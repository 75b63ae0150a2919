"""Requests to stop: a signal sets a flag, and all ranks agree on it between two pieces of work."""

import signal
import time

from megascale.parallel.orphan import signal_when_parent_dies

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What schedulers and terminals send: SIGTERM before killing, Ctrl-C, and SLURM's early warning."""


class StopRequest:
    """Whether this process was asked to stop. One rank asked is enough: the loop sums the flags of all ranks."""

    def __init__(self) -> None:
        self.is_set = False
        self._first_s = 0.0

    def watch(self) -> None:
        """From here on a stop signal only sets the flag."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def deadline_s(self, grace_s: float) -> float | None:
        """Until when, by `time.monotonic`, what was asked for must be done; None while nothing limits it."""
        return self._first_s + grace_s if self.is_set and grace_s else None

    def _note(self, number: int, frame: object) -> None:
        if not self.is_set:
            self._first_s = time.monotonic()
        self.is_set = True


def stop_when_parent_dies() -> None:
    """Asks Linux to send SIGTERM when the launcher is gone, so that no rank is orphaned; elsewhere does nothing."""
    signal_when_parent_dies(signal.SIGTERM)
