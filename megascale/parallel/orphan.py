"""What Linux does to a process whose parent is gone."""

import ctypes
import sys

PR_SET_PDEATHSIG = 1


def signal_when_parent_dies(number: int) -> None:
    """Asks Linux to send this process a signal when the thread that started it is gone; elsewhere does nothing.

    Survives exec, not fork.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
