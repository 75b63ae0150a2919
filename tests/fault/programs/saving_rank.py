"""A rank that saves step 3 through a writer process, begins step 6 while the writer is stopped, and waits to be killed.

Argument: the run folder. Prints the writer's process id when it has begun.
"""

import os
import signal
import sys
from pathlib import Path

from megascale.checkpoint.comm import LocalComm
from megascale.checkpoint.local_store import LocalStore
from megascale.checkpoint.retention import Retention
from megascale.checkpoint.save import Saver
from megascale.checkpoint.writer import ProcessWriter
from tests.support.checkpoint_ranks import RUN, cut_flat, make_tensors, state_at


def main(run_folder: Path) -> None:
    pieces, = cut_flat(make_tensors({"master/a": (7, 5)}), [])
    writer = ProcessWriter()
    saver = Saver(LocalStore(run_folder), RUN, comm=LocalComm(), retention=Retention(1), writer=writer)
    saver.start(state_at(3), pieces)
    saver.finish()
    os.kill(writer._process.pid, signal.SIGSTOP)
    saver.start(state_at(6), pieces)
    print(writer._process.pid, flush=True)
    signal.pause()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
