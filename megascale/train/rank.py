"""One rank of a run: `python -m megascale.train.rank CONFIG [options] [a.b=c ...]`, as every launcher starts it."""

import os
import sys
import warnings
from pathlib import Path
from typing import NoReturn

from megascale.parallel.heartbeat import Heartbeat
from megascale.parallel.supervision import HEARTBEAT_VARIABLE
from megascale.train.signals import StopRequest, stop_when_parent_dies
from megascale.train.watch import start_watch


def main(arguments: list[str]) -> NoReturn:
    """Trains as one of the ranks that the environment describes and ends the process with its exit code.

    Without the interpreter's own ending: when a peer has failed, torch's process groups abort in it, and the abort
    would take the place of the exit code.
    """
    stop_when_parent_dies()
    path = os.environ.get(HEARTBEAT_VARIABLE)
    pulse = Heartbeat(Path(path) if path else None)
    start_watch(os.environ, pulse)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    # Only here, since torch takes seconds: who watches sees the rank while it is imported.
    from megascale.train.session import train_as_rank

    stop = StopRequest()
    stop.watch()
    code = train_as_rank(arguments, stop, pulse)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
