"""Two ranks as an agent starts them: with heartbeats, pipes that they listen to, and a socket for rank 0's store."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from megascale.parallel.heartbeat import Beat, read_beat
from megascale.parallel.supervision import (
    DUMP_VARIABLE,
    HEARTBEAT_VARIABLE,
    INCARNATION_VARIABLE,
    STORE_FD_VARIABLE,
    WATCH_VARIABLE,
)
from tests.support.faulty_run import is_alive, wait_until
from tests.support.ranks import REPOSITORY
from tests.support.tiny_run import command_environment


class WatchedRanks:
    """Two ranks of a module that are being watched.

    Args:
        folder: for heartbeats, dumps and output.
        environment: further variables.
    """

    def __init__(self, module: str, folder: Path, arguments: list[str], **environment: str):
        self.folder, self.pipes, self.processes = folder, [], []
        folder.mkdir(exist_ok=True)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            for rank in (0, 1):
                self._start(module, rank, arguments, listener, environment)

    def _start(
        self, module: str, rank: int, arguments: list[str], listener: socket.socket,
        environment: dict[str, str],
    ) -> None:
        reads, writes = os.pipe()
        handed = [reads, *([listener.fileno()] if rank == 0 else [])]
        variables = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(listener.getsockname()[1]), "DS_ACCELERATOR": "cpu", WATCH_VARIABLE: str(reads),
            DUMP_VARIABLE: str(self.folder), HEARTBEAT_VARIABLE: str(self.folder / f"beat_{rank}"),
            INCARNATION_VARIABLE: "test.0", **environment,
        }
        if rank == 0:
            variables[STORE_FD_VARIABLE] = str(listener.fileno())
        with (self.folder / f"rank_{rank}.log").open("w") as output:
            self.processes.append(subprocess.Popen(
                [sys.executable, "-m", module, *map(str, arguments)], env=command_environment(**variables),
                cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT, pass_fds=handed,
            ))
        os.close(reads)
        self.pipes.append(writes)

    def beat(self, rank: int) -> Beat | None:
        """What a rank is doing."""
        return read_beat(self.folder / f"beat_{rank}")

    def ask_for_dump(self) -> None:
        """Asks both ranks for their stacks and collectives, and waits for them."""
        for pipe in self.pipes:
            os.write(pipe, b"d")
        paths = [self.folder / f"collectives_{rank:05d}.json" for rank in (0, 1)]
        wait_until(lambda: all(path.exists() for path in paths), self.text, 20)

    def let_go(self) -> None:
        """Closes the pipes, as the agent's death does."""
        while self.pipes:
            os.close(self.pipes.pop())

    def wait(self, timeout_s: float) -> list[int]:
        """Exit codes, once both have ended."""
        wait_until(lambda: not any(is_alive(process.pid) for process in self.processes), self.text, timeout_s)
        return [process.wait() for process in self.processes]

    def text(self) -> str:
        """What both have printed so far."""
        return "".join((self.folder / f"rank_{rank}.log").read_text() for rank in (0, 1))

    def close(self) -> None:
        """Leaves nothing running."""
        self.let_go()
        for process in self.processes:
            process.kill()
            process.wait()


@contextlib.contextmanager
def watched_ranks(module: str, folder: Path, arguments: list[str], **environment: str) -> Iterator[WatchedRanks]:
    """Watched ranks, ended with the block."""
    ranks = WatchedRanks(module, folder, arguments, **environment)
    try:
        yield ranks
    finally:
        ranks.close()
