"""What supervision costs a step: `python -m bench.supervision`.

Three equal loops train the same small model on gloo ranks, in blocks of steps in turn; the others wait for their turn
without using a core. One loop is watched: heartbeat file, watch thread and torch's flight recorder in its ranks, and
their processes and heartbeats looked at from outside as often as an agent does. The two others are plain, without a
recorder, and one against the other is the noise. What an agent and its controller say to each other, two messages a
second, isn't in it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import cycle, permutations
from pathlib import Path

import numpy as np

from bench.figures import describe_machine, show_head, show_row
from bench.step_overhead import SHAPES
from launcher.local import rank_environment
from launcher.supervise.agent import BEAT_S
from launcher.supervise.attempt import FLIGHT_RECORDER
from megascale.parallel.heartbeat import read_beat
from megascale.parallel.supervision import DUMP_VARIABLE, HEARTBEAT_VARIABLE, WATCH_VARIABLE
from megascale.train.signals import stop_when_parent_dies

RANKS = 2
WATCHED, PLAIN, AGAIN = "watched", "plain", "plain again"
COLUMNS = ("model", "plain, ms", "watched / plain", "plain again / plain", "blocks", "steps a block")
WARM_UP_BLOCKS, MIN_BLOCKS = 2, 6
RESAMPLES = 2000


class Loop:
    """The ranks of one loop, each waiting for its turn on a pipe."""

    def __init__(self, name: str, shape: str, folder: Path, at_end: ExitStack):
        self.heartbeats: list[Path] = []
        self.ranks = [self._start(name, rank, shape, folder, at_end) for rank in range(RANKS)]

    def take_block(self, steps: int) -> float:
        """Seconds that so many steps take, by rank 0's clock."""
        for rank in self.ranks:
            rank.stdin.write(f"{steps}\n".encode())
            rank.stdin.flush()
        answers = [rank.stdout.readline() for rank in self.ranks]
        return float(answers[0])

    def look(self) -> None:
        """What an agent does twice a second."""
        for rank, path in zip(self.ranks, self.heartbeats, strict=False):
            read_beat(path)
            for file in ("stat", "cgroup"):
                Path(f"/proc/{rank.pid}/{file}").read_text(encoding="utf-8")

    def _start(self, name: str, rank: int, shape: str, folder: Path, at_end: ExitStack) -> subprocess.Popen:
        environment = os.environ | rank_environment(rank, rank, RANKS, "127.0.0.1", 0, 1)
        environment |= {"OMP_NUM_THREADS": "1", "TORCH_FR_BUFFER_SIZE": "0"}
        inherited = ()
        if name == WATCHED:
            end, kept = os.pipe()
            at_end.callback(os.close, kept)
            at_end.callback(os.close, end)
            self.heartbeats.append(folder / f"beat_{rank}")
            environment |= FLIGHT_RECORDER | {
                HEARTBEAT_VARIABLE: str(self.heartbeats[-1]), WATCH_VARIABLE: str(end), DUMP_VARIABLE: str(folder),
            }
            inherited = (end,)
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.supervision_rank", shape, str(folder / name)], env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=inherited, preexec_fn=stop_when_parent_dies,
        )
        at_end.callback(process.wait)
        at_end.callback(process.kill)
        return process


def keep_looking(loop: Loop, is_over: threading.Event) -> None:
    """Looks at the ranks until the bench is over."""
    while not is_over.wait(BEAT_S):
        loop.look()


def measure(shape: str, seconds: float, steps: int) -> dict[str, list[float]]:
    """Seconds of each block of each loop: round after round, a block of each, in every order in turn."""
    with ExitStack() as at_end:
        shared = Path("/dev/shm")
        folder = Path(at_end.enter_context(
            tempfile.TemporaryDirectory(prefix="megascale-", dir=shared if shared.is_dir() else None)))
        loops = {name: Loop(name, shape, folder, at_end) for name in (PLAIN, WATCHED, AGAIN)}
        is_over = threading.Event()
        threading.Thread(target=keep_looking, args=(loops[WATCHED], is_over), daemon=True).start()
        at_end.callback(is_over.set)
        for loop in loops.values():
            loop.take_block(steps * WARM_UP_BLOCKS)
        times: dict[str, list[float]] = {name: [] for name in loops}
        deadline, orders = time.monotonic() + seconds, cycle(permutations(loops))
        while len(times[PLAIN]) < MIN_BLOCKS or time.monotonic() < deadline:
            for name in next(orders):
                times[name].append(loops[name].take_block(steps))
        return times


def median_interval(ratios: Sequence[float]) -> str:
    """Median of paired ratios and its 95 % interval, by resampling."""
    found = np.asarray(ratios)
    drawn = np.random.default_rng(0).choice(found, (RESAMPLES, len(found)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return f"{np.median(found):.4f} ({low:.4f} to {high:.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["d64", "d256"])
    parser.add_argument("--seconds", type=float, default=60.0, help="time measured for each row of the table")
    parser.add_argument("--steps", type=int, default=10, help="in a block")
    options = parser.parse_args()
    print(describe_machine(["torch", "deepspeed"]))
    print(f"{RANKS} ranks, 1 thread each; ratios: median of paired blocks (95 % interval of it)\n")
    print(show_head(COLUMNS), flush=True)
    for shape in options.shapes:
        times = {name: np.asarray(each) for name, each in measure(shape, options.seconds, options.steps).items()}
        plain = times[PLAIN]
        print(show_row((
            shape, f"{np.median(plain) / options.steps * 1e3:.1f}", median_interval(times[WATCHED] / plain),
            median_interval(times[AGAIN] / plain), len(plain), options.steps,
        )), flush=True)


if __name__ == "__main__":
    main()
