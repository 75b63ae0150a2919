"""How a rank answers the agent that watches it: it dumps what it is doing when asked, and ends when the agent is gone.

The agent holds the other end of a pipe. A byte `d` asks for a dump; the pipe's end says that the agent is dead, and a
rank that nobody watches must not outlive it: its node may be given to another attempt of the run. A thread reads the
pipe, which needs the interpreter's lock; where a library holds that, SIGUSR2 still writes the stacks.
"""

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from megascale.errors import EXIT_PEER_LOST
from megascale.parallel.heartbeat import Heartbeat
from megascale.parallel.supervision import DUMP_BYTE, DUMP_SIGNAL, DUMP_VARIABLE, WATCH_VARIABLE

ORPHAN_S = 8
"""How long a rank lives without its agent, at most; it may save what it can in that time."""
RECORDERS = ("_dump_fr_trace_json", "_dump_nccl_trace_json")
"""What torch calls the flight recorders of gloo and of NCCL; a build has one or both."""


def start_watch(environment: Mapping[str, str], pulse: Heartbeat) -> None:
    """Listens to the agent from here on; does nothing where the environment names none.

    The files are opened now: a dump may come when no more can be opened.
    """
    if WATCH_VARIABLE not in environment:
        return
    pipe = int(environment[WATCH_VARIABLE])
    os.set_inheritable(pipe, False)  # a process that this rank starts must not hold the agent's pipe
    rank = int(environment.get("RANK", "0"))
    folder = Path(environment[DUMP_VARIABLE])
    folder.mkdir(parents=True, exist_ok=True)
    stacks = os.open(stacks_path(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    faulthandler.register(DUMP_SIGNAL, stacks, all_threads=True)
    thread = threading.Thread(
        target=_listen, args=(pipe, stacks, collectives_path(folder, rank), pulse), name="megascale-watch", daemon=True
    )
    thread.start()


def stacks_path(folder: Path, rank: int) -> Path:
    """Where a rank's Python stacks go, one dump after the other."""
    return folder / f"stacks_{rank:05d}.txt"


def collectives_path(folder: Path, rank: int) -> Path:
    """Where a rank's newest collectives go; it is replaced as a whole, last of a dump, so it says that one is done."""
    return folder / f"collectives_{rank:05d}.json"


def read_collectives() -> dict:
    """What torch's flight recorders hold: `entries` and `pg_config`, as torch names them; empty before torch is there.

    Without an import, which would wait for the one that the main thread may be in.
    """
    backend = sys.modules.get("torch._C._distributed_c10d")
    found: dict = {"entries": [], "pg_config": {}}
    for name in RECORDERS:
        if hasattr(backend, name):
            recorded = json.loads(getattr(backend, name)(True, False))
            found["entries"] += recorded.get("entries", [])
            found["pg_config"] |= recorded.get("pg_config", {})
    return found


def _listen(pipe: int, stacks: int, collectives: Path, pulse: Heartbeat) -> None:
    while asked := os.read(pipe, 1):
        if asked == DUMP_BYTE:
            _dump(stacks, collectives, pulse)
    # The kernel's own clock ends this process even when a library never gives the interpreter's lock back.
    signal.setitimer(signal.ITIMER_REAL, ORPHAN_S)
    time.sleep(ORPHAN_S - 1)
    os._exit(EXIT_PEER_LOST)


def _dump(stacks: int, collectives: Path, pulse: Heartbeat) -> None:
    """Never raises: a dump that fails must not end the run that it is to explain."""
    try:
        os.write(stacks, f"--- {time.strftime('%Y-%m-%d %H:%M:%S %z')}, in phase {pulse.phase}\n".encode())
        faulthandler.dump_traceback(stacks, all_threads=True)
    except Exception as error:
        print(f"warning: no stacks of this rank: {error!r}", file=sys.stderr)
    try:
        try:
            found = read_collectives()
        except Exception as error:
            found = {"entries": [], "pg_config": {}, "error": repr(error)}
        draft = collectives.with_suffix(".tmp")
        draft.write_text(json.dumps(found), encoding="utf-8")
        draft.replace(collectives)
    except Exception as error:
        print(f"warning: no collectives of this rank: {error!r}", file=sys.stderr)
