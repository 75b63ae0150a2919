"""One rank of `bench.checkpoint`: saves the same state in every way by turns, and prints the tables.

Argument: the options of `bench.checkpoint` as JSON.
"""

import json
import os
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from bench.checkpoint import Options
from bench.figures import show_head, show_ratios, show_row
from megascale.checkpoint.find import verify_checkpoint
from megascale.checkpoint.index import RunRecord
from megascale.checkpoint.load import fill_pieces, load_pieces
from megascale.checkpoint.local_store import LocalStore
from megascale.checkpoint.retention import Retention
from megascale.checkpoint.save import Saver
from megascale.checkpoint.state import RunState
from megascale.checkpoint.writer import InlineWriter, ProcessWriter, Writer
from megascale.data.stream import StreamRecord
from megascale.engine.base import StatePiece
from megascale.optim.state import ADAMW_KINDS
from megascale.parallel.boxes import Box
from megascale.parallel.layout import Layout
from megascale.parallel.mesh import Mesh, build_mesh, close_mesh, read_rank_info

WIDTH, ROWS_PER_TENSOR = 1024, 1024
RECORD = RunRecord("bench", {}, "0", StreamRecord({}, ()), {}, {}, ())
READ_BYTES = 8 << 20
Times = tuple[float, float]
"""Seconds until the rank may go on, and until the checkpoint counts; the slowest rank's."""


class Bench:
    """One rank's state and the ways to save it."""

    def __init__(self, options: Options, mesh: Mesh):
        self.folder, self.mesh = Path(options.folder), mesh
        self.pieces = make_pieces(options.millions * 1_000_000, mesh)
        self.bytes_per_rank = sum(piece.tensor.numel() for piece in self.pieces) * 4
        self.num_saves = 0
        self.savers = {
            "ours, asynchronous": self.build_saver("asynchronous", ProcessWriter()),
            "ours, synchronous": self.build_saver("synchronous", InlineWriter()),
            "ours, asynchronous, not read back": self.build_saver("unread", ProcessWriter(), read_back=False),
        }
        self.gloo = torch.distributed.new_group(backend="gloo")

    def build_saver(self, name: str, writer: Writer, read_back: bool = True) -> Saver:
        """A saver with a run folder of its own that keeps one checkpoint."""
        store = LocalStore(self.folder / name)
        if self.mesh.rank == 0:
            store.run_folder.mkdir()
        self.mesh.barrier()
        return Saver(store, RECORD, comm=self.mesh, retention=Retention(1), writer=writer, read_back=read_back)

    def save_ours(self, name: str) -> Times:
        """By one of our savers, as the loop does, waiting for nothing in between."""
        self.num_saves += 1
        start = time.perf_counter()
        self.savers[name].start(replace(RunState.at_start(), step=self.num_saves), self.pieces)
        blocked = time.perf_counter() - start
        self.savers[name].finish()
        return blocked, time.perf_counter() - start

    def save_dcp(self, kind: AsyncCheckpointerType) -> Times:
        """By torch's asynchronous save; each rank's tensors have names of their own."""
        state = {f"rank{self.mesh.rank}.{piece.key}": piece.tensor for piece in self.pieces}
        target = self.folder / f"dcp-{kind.value}"
        start = time.perf_counter()
        future = dcp.async_save(
            state, checkpoint_id=target, process_group=self.gloo, async_checkpointer_type=kind,
        )
        blocked = time.perf_counter() - start
        getattr(future, "upload_completion", future).result()
        self.mesh.barrier()
        return blocked, time.perf_counter() - start

    def write_plainly(self) -> Times:
        """The same bytes to one file a rank, and fsync."""
        path = self.folder / f"plain-{self.mesh.rank}"
        path.unlink(missing_ok=True)
        start = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            for piece in self.pieces:
                rest = memoryview(piece.tensor.numpy()).cast("B")
                while rest:
                    rest = rest[file.write(rest):]
            os.fsync(file.fileno())
        self.mesh.barrier()
        both = time.perf_counter() - start
        return both, both

    def read_plainly(self) -> float:
        """That file, from memory or disk as the system has it."""
        buffer = bytearray(READ_BYTES)
        with (self.folder / f"plain-{self.mesh.rank}").open("rb", buffering=0) as file:
            return self.timed(lambda: [None for _ in iter(lambda: file.readinto(buffer), 0)])

    def timed(self, work: Callable[[], object]) -> float:
        """Seconds until every rank has done it."""
        self.mesh.barrier()
        start = time.perf_counter()
        work()
        self.mesh.barrier()
        return time.perf_counter() - start

    def slowest(self, seconds: float) -> float:
        """Over all ranks."""
        return max(self.mesh.control_gather(round(seconds * 1e6))) / 1e6


def make_pieces(num_parameters: int, mesh: Mesh) -> list[StatePiece]:
    """This rank's share of weights and moments: each tensor's rows are dealt out among the ranks."""
    num_tensors = max(1, num_parameters // (WIDTH * ROWS_PER_TENSOR))
    edges = [ROWS_PER_TENSOR * rank // mesh.world_size for rank in (mesh.rank, mesh.rank + 1)]
    box = Box((edges[0], 0), (edges[1], WIDTH))
    generator = torch.Generator().manual_seed(mesh.rank)
    return [
        StatePiece(f"{kind}/{number:04d}", (ROWS_PER_TENSOR, WIDTH), box, torch.randn(box.numel, generator=generator),
                   is_owner=True)
        for number in range(num_tensors) for kind in ("master", *ADAMW_KINDS)
    ]


def run_rounds(bench: Bench, rounds: int) -> dict[str, list[Times]]:
    """Each way once a round, in turns; the first round, which touches memory for the first time, isn't counted."""
    ways = {name: (lambda name=name: bench.save_ours(name)) for name in bench.savers} | {
        f"torch async_save, {kind.value}": (lambda kind=kind: bench.save_dcp(kind)) for kind in AsyncCheckpointerType
    } | {"plain writes": bench.write_plainly}
    times = defaultdict(list)
    for number in range(rounds + 1):
        for name in list(ways)[number % len(ways):] + list(ways)[: number % len(ways)]:
            bench.mesh.barrier()
            blocked, saved = ways[name]()
            both = bench.slowest(blocked), bench.slowest(saved)
            if number:
                times[name].append(both)
    return times


def run_loads(bench: Bench, rounds: int) -> dict[str, list[float]]:
    """Verifying and loading what was saved, against plain reads; in turns."""
    saver_store = LocalStore(bench.folder / "asynchronous")
    step = saver_store.steps()[-1]
    found = verify_checkpoint(saver_store, step, comm=bench.mesh)
    times = defaultdict(list)
    for _ in range(rounds):
        times["plain reads"].append(bench.read_plainly())
        times["verify (SHA-256)"].append(bench.timed(partial(verify_checkpoint, saver_store, step, comm=bench.mesh)))
        times["fill the tensors"].append(bench.timed(partial(fill_pieces, found, bench.pieces)))
        times["fill and check the digests"].append(
            bench.timed(partial(load_pieces, found, bench.pieces, comm=bench.mesh)))
    return times


def print_tables(bench: Bench, times: dict[str, list[Times]], loads: dict[str, list[float]]) -> None:
    """What was found."""
    total_mb = bench.bytes_per_rank * bench.mesh.world_size / 1e6
    print(f"{total_mb:.0f} MB of state over {bench.mesh.world_size} ranks; medians, and quartiles of ratios in a round")
    print(show_head((
        "saved by", "blocked, ms", "/ synchronous", "/ torch, thread", "saved, s", "/ plain writes", "MB/s",
    )))
    synchronous, torch_thread = times["ours, synchronous"], times["torch async_save, thread"]
    for name, rows in times.items():
        blocked = [row[0] / other[1] for row, other in zip(rows, synchronous, strict=True)]
        against = [row[0] / other[0] for row, other in zip(rows, torch_thread, strict=True)]
        plain = [row[1] / other[1] for row, other in zip(rows, times["plain writes"], strict=True)]
        saved_s = median(row[1] for row in rows)
        print(show_row((
            name, f"{1000 * median(row[0] for row in rows):.0f}", show_ratios(blocked), show_ratios(against),
            f"{saved_s:.2f}", show_ratios(plain), f"{total_mb / saved_s:.0f}",
        )))
    print()
    print(show_head(("loaded by", "s", "/ plain reads", "MB/s")))
    for name, seconds in loads.items():
        ratios = [a / b for a, b in zip(seconds, loads["plain reads"], strict=True)]
        print(show_row((name, f"{median(seconds):.2f}", show_ratios(ratios), f"{total_mb / median(seconds):.0f}")))
    stored = sum(path.stat().st_size for path in (bench.folder / "asynchronous").rglob("*") if path.is_file())
    parameters = bench.bytes_per_rank * bench.mesh.world_size / 12
    print(f"\n{stored / parameters:.4f} bytes on disk per parameter, all files together (weight and two moments: 12)")


def main(options: Options) -> None:
    info = read_rank_info(dict(os.environ))
    mesh = build_mesh(Layout(dp=info.world_size), info)
    bench = Bench(options, mesh)
    times = run_rounds(bench, options.rounds)
    loads = run_loads(bench, options.rounds)
    if mesh.rank == 0:
        print_tables(bench, times, loads)
    for saver in bench.savers.values():
        saver.close()
    mesh.barrier()
    close_mesh()
    if mesh.rank == 0:
        shutil.rmtree(options.folder, ignore_errors=True)


if __name__ == "__main__":
    main(Options(**json.loads(sys.argv[1])))
