"""Ranks of one process for checkpoint tests: threads that gather, and tensors cut up as sharded optimizers cut them."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch

from megascale.checkpoint.index import Change, LineageRecord, RunRecord, code_versions
from megascale.checkpoint.local_store import LocalStore
from megascale.checkpoint.retention import Retention
from megascale.checkpoint.save import save_checkpoint
from megascale.checkpoint.state import RunState
from megascale.data.ledger import ReadCounts
from megascale.data.stream import CorpusRecord, StageRecord, StreamRecord
from megascale.engine.base import StatePiece
from megascale.parallel.boxes import Box, boxes_of_flat_range

TIMEOUT_S = 60.0
STREAM = StreamRecord(
    corpora={"code": CorpusRecord("d1", 0.5), "web": CorpusRecord("d2", 0.0)},
    stages=(StageRecord(0, {"code": 16384, "web": 0}), StageRecord(24, {"code": 4096, "web": 12288})),
)
RUN = RunRecord(
    run_id="run-a", config={"model": {"num_layers": 2, "rope_base": 1e4}, "train": {"max_steps": 9}},
    config_fingerprint="c0ffee", stream=STREAM, validation={"code": "d3", "web": "d4"}, code=code_versions("abc"),
    lineage=(LineageRecord("fork", 2, "runs/b", "run-b", (Change("optimizer.learning_rate", 0.1, 0.2),)),),
)


class PeerGoneError(RuntimeError):
    """What a collective raises when another rank died."""


class ThreadComm:
    """One rank among threads of this process."""

    def __init__(self, rank: int, values: list[int], barrier: threading.Barrier):
        self.rank, self.world_size = rank, len(values)
        self._values, self._barrier = values, barrier

    def control_gather(self, value: int) -> list[int]:
        try:
            self._values[self.rank] = value
            self._barrier.wait(TIMEOUT_S)
            gathered = list(self._values)
            self._barrier.wait(TIMEOUT_S)
        except threading.BrokenBarrierError:
            raise PeerGoneError from None
        return gathered

    def control_sum(self, values: list[int]) -> list[int]:
        columns = [sum(self.control_gather(value)) for value in values]
        return [(total + 2**63) % 2**64 - 2**63 for total in columns]

    def die(self) -> None:
        """Makes the other ranks' collectives fail, as a closed connection does."""
        self._barrier.abort()


def run_ranks(world_size: int, body: Callable[[ThreadComm], object]) -> list:
    """Runs the body on every rank at once; gives each rank's result, or the exception that it ended with."""
    values, barrier = [0] * world_size, threading.Barrier(world_size)

    def run(rank: int):
        comm = ThreadComm(rank, values, barrier)
        try:
            return body(comm)
        except BaseException as error:
            if not isinstance(error, Exception):
                comm.die()
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size)))


def make_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random fp32 tensors by key."""
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def cut_flat(tensors: dict[str, torch.Tensor], cuts: Sequence[int]) -> list[list[StatePiece]]:
    """Pieces of each rank when all tensors are laid end to end and cut at fractions of 1,000,000, as ZeRO does."""
    total = sum(tensor.numel() for tensor in tensors.values())
    bounds = [0, *sorted(cut * total // 1_000_000 for cut in cuts), total]
    ranks = []
    for start, stop in pairwise(bounds):
        position, pieces = 0, []
        for key, tensor in tensors.items():
            inside = (max(start, position) - position, min(stop, position + tensor.numel()) - position)
            pieces += [make_piece(key, tensor, box) for box in boxes_of_flat_range(tuple(tensor.shape), *inside)]
            position += tensor.numel()
        ranks.append(pieces)
    return ranks


def cut_columns(tensors: dict[str, torch.Tensor], world_size: int) -> list[list[StatePiece]]:
    """Pieces of each rank when the last dim is shared out, as tensor parallelism does; scalars go to rank 0."""
    ranks = [[] for _ in range(world_size)]
    for key, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if not shape:
            ranks[0].append(make_piece(key, tensor, Box((), ())))
            continue
        for rank, pieces in enumerate(ranks):
            start, stop = (shape[-1] * number // world_size for number in (rank, rank + 1))
            if start < stop:
                pieces.append(make_piece(key, tensor, Box((0,) * (len(shape) - 1) + (start,), (*shape[:-1], stop))))
    return ranks


def make_piece(key: str, tensor: torch.Tensor, box: Box) -> StatePiece:
    return StatePiece(key, tuple(tensor.shape), box, tensor[box.slices].reshape(-1).clone(), is_owner=True)


def zeros_like(ranks: list[list[StatePiece]]) -> list[list[StatePiece]]:
    """The same layout with nothing in it, to load into."""
    return [
        [StatePiece(p.key, p.global_shape, p.box, torch.zeros_like(p.tensor), p.is_owner) for p in pieces]
        for pieces in ranks
    ]


def equal_bits(ranks: list[list[StatePiece]], others: list[list[StatePiece]]) -> bool:
    pairs = [pair for ours, theirs in zip(ranks, others, strict=True) for pair in zip(ours, theirs, strict=True)]
    return all(torch.equal(a.tensor.view(torch.int32), b.tensor.view(torch.int32)) for a, b in pairs)


def state_at(step: int) -> RunState:
    return replace(
        RunState.at_start("wandb-1"),
        step=step, rows=8 * step, tokens=100 * step, ledger={"code": ReadCounts(8 * step, 120 * step, 0)},
        stream_digest=f"{step:016x}", optimizer_scalars={"step": float(step), "loss_scale": 2.0**16},
    )


def save_all(
    run_folder: Path, step: int, ranks: list[list[StatePiece]], *, run: RunRecord = RUN, keep_last: int = 2
) -> list:
    """Saves with one thread a rank; gives each rank's path or exception."""
    return run_ranks(len(ranks), lambda comm: save_checkpoint(
        LocalStore(run_folder), run, state_at(step), ranks[comm.rank], comm=comm, retention=Retention(keep_last),
    ))
