"""Requests to stop: a signal sets a flag, and all ranks agree on it between two pieces of work."""

import ctypes
import signal
import sys

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What schedulers and terminals send: SIGTERM before killing, Ctrl-C, and SLURM's early warning."""

PR_SET_PDEATHSIG = 1


class StopRequest:
    """Whether this process was asked to stop. One rank asked is enough: the loop sums the flags of all ranks."""

    def __init__(self) -> None:
        self.is_set = False

    def watch(self) -> None:
        """From here on a stop signal only sets the flag."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.is_set = True


def stop_when_parent_dies() -> None:
    """Asks Linux to send SIGTERM when the launcher is gone, so that no rank is orphaned; elsewhere does nothing.

    Survives exec, not fork.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
