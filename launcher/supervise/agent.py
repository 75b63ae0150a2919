"""One per node: starts ranks, looks at them from outside, and does what the controller says.

It answers to nobody else, keeps nothing when it ends, and ends its ranks when the controller is gone: a node that was
cut off must not train on beside the attempt that replaces it.
"""

import argparse
import contextlib
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from launcher.local import CPU_ENVIRONMENT, count_cores, count_gpus
from launcher.submit.environment import INTERFACE_VARIABLES
from launcher.supervise.interfaces import address_of, interface_of
from launcher.supervise.rank_process import RankProcess
from launcher.supervise.wire import Channel, connect, read_token
from megascale.errors import LaunchError
from megascale.parallel.supervision import DUMP_VARIABLE, HEARTBEAT_VARIABLE, STORE_FD_VARIABLE
from megascale.train.signals import STOP_SIGNALS

POLL_S = 0.1
BEAT_S = 0.5
STORE_BACKLOG = 4096
PREFLIGHT_MODULE = "launcher.supervise.preflight"


class Agent:
    """An agent that is connected.

    Args:
        node: its node's name.
        silence_s: after so many seconds without a word from the controller it counts as gone.
    """

    def __init__(self, channel: Channel, node: str, silence_s: float):
        self._channel, self._node, self._silence_s = channel, node, silence_s
        self._ranks: list[RankProcess] = []
        self._attempt, self._is_gone_told = -1, True
        self._store: socket.socket | None = None
        self._preflight: subprocess.Popen | None = None
        self._heard_s = self._beat_s = time.monotonic()
        self._asked: list[int] = []
        self._is_over = False
        memory = Path("/dev/shm")
        self._folder = Path(tempfile.mkdtemp(prefix="megascale-", dir=memory if memory.is_dir() else None))
        self._selector = selectors.DefaultSelector()
        self._selector.register(channel, selectors.EVENT_READ, self._read_channel)

    def run(self) -> None:
        """Serves until the controller says quit or is gone."""
        for number in {*STOP_SIGNALS, signal.SIGUSR2}:
            signal.signal(number, lambda number, frame: self._asked.append(number))
        try:
            while not self._is_over:
                for key, _ in self._selector.select(POLL_S):
                    key.data()
                self._channel.flush()
                self._tell_signals()
                self._tell_ends()
                self._tell_beats()
                if time.monotonic() - self._heard_s > self._silence_s:
                    raise ConnectionError(f"no word from the controller for {self._silence_s:g} s")
        except (ConnectionError, LaunchError) as error:
            print(f"agent on {self._node}: {error}; ending its ranks", file=sys.stderr, flush=True)
        finally:
            self._end()

    def _read_channel(self) -> None:
        for message in self._channel.receive():
            self._heard_s = time.monotonic()
            handler: Callable[[dict], None] = getattr(self, f"_do_{message['type']}")
            handler(message)

    def _do_ping(self, message: dict) -> None:
        self._channel.send({"type": "pong"})

    def _do_quit(self, message: dict) -> None:
        self._is_over = True

    def _do_preflight(self, message: dict) -> None:
        self._preflight = subprocess.Popen(
            [sys.executable, "-m", PREFLIGHT_MODULE, message["request"]], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, start_new_session=True,
        )
        os.set_blocking(self._preflight.stdout.fileno(), False)
        self._selector.register(self._preflight.stdout, selectors.EVENT_READ, self._read_preflight)

    def _do_preflight_input(self, message: dict) -> None:
        with contextlib.suppress(OSError, AttributeError, ValueError):
            self._preflight.stdin.write((message["line"] + "\n").encode())
            self._preflight.stdin.flush()

    def _read_preflight(self) -> None:
        text = self._preflight.stdout.read()
        if text:
            self._channel.send({"type": "preflight", "text": text.decode(errors="replace")})
        elif text is not None:
            self._selector.unregister(self._preflight.stdout)
            self._channel.send({"type": "preflight_end", "code": self._preflight.wait()})

    def _do_open_store(self, message: dict) -> None:
        """Listens for the ranks' rendezvous: on one interface, at a port that nobody had."""
        self._close_store()
        interface = message["interface"]
        address = address_of(interface) if interface else self._channel.address
        self._store = socket.create_server((address, 0), backlog=STORE_BACKLOG)
        host, port = self._store.getsockname()[:2]
        self._channel.send({"type": "store", "attempt": message["attempt"], "host": host, "port": port})

    def _do_start(self, message: dict) -> None:
        self._attempt, self._is_gone_told = message["attempt"], False
        folder = Path(message["folder"])
        cores = share_cores(sorted(os.sched_getaffinity(0)), len(message["ranks"]))
        for local_rank, rank in enumerate(message["ranks"]):
            own = self._rank_environment(message, rank, local_rank, len(message["ranks"]))
            inherited = (self._store.fileno(),) if rank == 0 and self._store else ()
            heartbeat = self._folder / f"rank_{message['attempt']}_{rank}"
            own |= {HEARTBEAT_VARIABLE: str(heartbeat), DUMP_VARIABLE: str(folder)}
            self._ranks.append(RankProcess(
                rank, message["command"], os.environ | own, folder, heartbeat, cores[local_rank], inherited,
            ))
        self._close_store()  # rank 0 has it now; a second holder would keep it open when rank 0 is gone
        self._channel.send({"type": "started", "attempt": self._attempt, "environment": own})

    def _rank_environment(self, message: dict, rank: int, local_rank: int, num_ranks: int) -> dict[str, str]:
        interface = message["interface"] or interface_of(self._channel.address)
        own = {} if count_gpus() else dict(CPU_ENVIRONMENT)
        own |= {"OMP_NUM_THREADS": str(max(1, count_cores() // num_ranks)), "PYTHONUNBUFFERED": "1"}
        own |= dict.fromkeys(INTERFACE_VARIABLES, interface) if interface else {}
        own |= message["environment"] | {"RANK": str(rank), "LOCAL_RANK": str(local_rank)}
        if rank == 0 and self._store:
            own[STORE_FD_VARIABLE] = str(self._store.fileno())
        return own

    def _do_signal(self, message: dict) -> None:
        if message["attempt"] == self._attempt:
            for rank in self._ranks:
                rank.signal(signal.Signals[message["name"]])

    def _do_dump(self, message: dict) -> None:
        for rank in self._ranks:
            rank.ask_for_dump()

    def _do_thaw(self, message: dict) -> None:
        """Lets stopped ranks go on: they have a dump to write, and then they are ended."""
        for rank in self._ranks:
            rank.signal(signal.SIGCONT)

    def _do_kill(self, message: dict) -> None:
        for rank in self._ranks:
            rank.kill()

    def _tell_signals(self) -> None:
        while self._asked:
            self._channel.send({"type": "asked", "name": signal.Signals(self._asked.pop(0)).name})

    def _tell_ends(self) -> None:
        for rank in self._ranks:
            if not rank.has_reported and rank.code is not None:
                rank.has_reported = True
                rank.kill()  # what it left behind
                self._channel.send({"type": "exit", "attempt": self._attempt, **rank.describe_end()})
        if not self._is_gone_told and all(rank.has_reported for rank in self._ranks):
            self._ranks, self._is_gone_told = [], True
            self._channel.send({"type": "gone", "attempt": self._attempt})

    def _tell_beats(self) -> None:
        now_s = time.monotonic()
        if now_s - self._beat_s < BEAT_S:
            return
        self._beat_s = now_s
        beats = [rank.look() for rank in self._ranks if not rank.has_reported]
        if beats:
            self._channel.send({"type": "beats", "attempt": self._attempt, "now_s": now_s, "ranks": beats})

    def _close_store(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None

    def _end(self) -> None:
        """Leaves nothing running and nothing behind."""
        for rank in self._ranks:
            rank.kill()
        for rank in self._ranks:
            rank.process.wait()
        if self._preflight is not None and self._preflight.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._preflight.pid, signal.SIGKILL)
            self._preflight.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def share_cores(cores: list[int], num_ranks: int) -> list[list[int]]:
    """Neighbouring cores for each rank of a node; no choice is made where there are fewer cores than ranks."""
    each = len(cores) // num_ranks
    return [cores[rank * each : (rank + 1) * each] if each else [] for rank in range(num_ranks)]


def main() -> None:
    """Connects and serves; arguments: --controller HOST:PORT --token-file PATH [--node NAME] [--silence SECONDS]."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--controller", required=True)
    parser.add_argument("--token-file", type=Path, required=True)
    parser.add_argument("--node", default=os.environ.get("SLURMD_NODENAME") or socket.gethostname())
    parser.add_argument("--silence", type=float, default=8.0)
    asked = parser.parse_args()
    host, _, port = asked.controller.rpartition(":")
    try:
        channel = connect(host, int(port), read_token(asked.token_file), {"node": asked.node})
    except (OSError, LaunchError) as error:
        sys.exit(f"error: agent on {asked.node} can't reach the controller at {asked.controller}: {error}")
    Agent(channel, asked.node, asked.silence).run()


if __name__ == "__main__":
    main()
