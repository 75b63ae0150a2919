"""Runs one rank of the topology grid: one state, carried through checkpoints from layout to layout.

Arguments: a folder, and a JSON object {reference, relays, loads}. With `reference` the plain layout trains, saves and
notes its tensors and what it computes next. Each layout of `relays` loads that and saves it as its own. `loads` gives
for each target layout the sources whose checkpoints it loads; rank 0 prints one JSON result a pair.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from megascale.checkpoint.find import find_checkpoint
from megascale.checkpoint.index import RunRecord
from megascale.checkpoint.load import load_pieces
from megascale.checkpoint.local_store import LocalStore
from megascale.checkpoint.retention import Retention
from megascale.checkpoint.save import save_checkpoint
from megascale.checkpoint.state import RunState
from megascale.config.derive import derive
from megascale.data.stream import StreamRecord
from megascale.engine.base import Engine
from megascale.parallel.mesh import Mesh, close_mesh, join_ranks, lay_out_mesh, read_rank_info
from megascale.train.build import build_run_engine, layout_of
from tests.support.layouts import LEARNING_RATE, ROW_BY_ROW, ROWS, SEQ_LEN, LayoutCase, case_config
from tests.support.tiny import batch_of_rows, random_rows, share_small_parameters

HALF, STEPS = 3, 5
"""The state is that after HALF steps; what follows is compared up to STEPS."""
RECORD = RunRecord("run", {}, "config", StreamRecord({}, ()), {}, {}, ())
REFERENCE = "reference"


def _case(name: str, ranks: int, **settings) -> LayoutCase:
    dtype = settings.pop("dtype", "fp32")
    return LayoutCase(name, ranks, settings, "gpt2", train=ROW_BY_ROW, precision={"dtype": dtype})


GRID = {case.name: case for case in [
    _case("dp1_zero0", 1, zero_stage=0),
    _case("dp1_bf16", 1, dtype="bf16"),
    _case("dp2_zero1", 2, zero_stage=1),
    _case("dp2_zero2_offload", 2, zero_stage=2, offload_optimizer="cpu"),
    _case("dp2_zero3", 2, zero_stage=3),
    _case("dp2_zero3_bf16", 2, zero_stage=3, dtype="bf16"),
    _case("tp2", 2, tp=2),
    _case("pp2", 2, pp=2),
    _case("pp2_interleaved", 2, pp=2, schedule="interleaved_1f1b"),
    _case("cp2_ring", 2, cp=2),
    _case("dp4_zero2", 4, zero_stage=2),
    _case("tp2_dp2_zero1", 4, tp=2, zero_stage=1),
    _case("tp2_dp2_zero3", 4, tp=2, zero_stage=3),
    _case("tp2_pp2", 4, tp=2, pp=2),
]}
"""Tied embeddings, biases and learned positions, so that every way of sharing a tensor occurs."""


@dataclass
class CountingStore(LocalStore):
    """A run folder that counts what is read of opened files."""

    run_folder: Path
    read_bytes: int = 0
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__init__(self.run_folder)

    @contextmanager
    def open(self, step: int, name: str) -> Iterator["CountedContent"]:
        self.names = (*self.names, name)
        with super().open(step, name) as content:
            yield CountedContent(content, self, content.size_bytes)


@dataclass(frozen=True)
class CountedContent:
    content: object
    store: CountingStore
    size_bytes: int

    def read(self, start: int, stop: int) -> memoryview:
        view = self.content.read(start, stop)
        self.store.read_bytes += len(view)
        return view


def take_steps(engine: Engine, mesh: Mesh, first: int, stop: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of the steps [first, stop)."""
    outputs, share = [], ROWS // mesh.layout.dp
    for step in range(first, stop):
        rows = random_rows(61, ROWS, SEQ_LEN, seed=step)
        own = range(mesh.dp_rank * share, (mesh.dp_rank + 1) * share)
        output = engine.train_step(
            [batch_of_rows(rows, [number]) for number in own],
            step=step, num_tokens=int((rows.labels != -100).sum()), learning_rate=LEARNING_RATE,
        )
        outputs.append((output.loss, output.grad_norm))
    return outputs


def build(name: str, rank: int, device: torch.device) -> tuple[Engine, Mesh]:
    """The engine of a layout, moved off its first weights, so that what isn't loaded shows."""
    case = GRID[name]
    config = case_config(case)
    mesh = lay_out_mesh(layout_of(config, derive(config, case.ranks, name)), rank, device)
    engine = build_run_engine(config, mesh)
    take_steps(engine, mesh, STEPS, STEPS + 1)
    return engine, mesh


def save(engine: Engine, mesh: Mesh, folder: Path) -> None:
    state = replace(RunState.at_start(), step=HALF, optimizer_scalars=engine.scalars())
    save_checkpoint(LocalStore(folder), RECORD, state, engine.state_pieces(), comm=mesh, retention=Retention(1))


def load(engine: Engine, mesh: Mesh, folder: Path) -> CountingStore:
    store = CountingStore(folder)
    found = find_checkpoint(store, run_id="run", comm=mesh)
    load_pieces(found, engine.state_pieces(), comm=mesh)
    engine.restore_scalars(found.index.state.optimizer_scalars)
    records, stored = found.index.files, dict.fromkeys(found.index.files, 0)
    for record in found.index.tensors.values():
        for part in record.slices:
            stored[part.file] += 4 * part.box.numel
    store.read_bytes -= sum(records[name].bytes - stored[name] for name in store.names)  # the headers
    return store


def write_reference(folder: Path, device: torch.device) -> None:
    """Trains the plain layout, saves, and notes whole tensors, without the checkpoint, and the steps that follow."""
    config = case_config(GRID["dp1_zero0"])
    mesh = lay_out_mesh(layout_of(config, derive(config, 1, REFERENCE)), 0, device)
    engine = build_run_engine(config, mesh)
    take_steps(engine, mesh, 0, HALF)
    save(engine, mesh, folder / REFERENCE)
    whole: dict[str, np.ndarray] = {}
    for piece in engine.state_pieces():
        target = whole.setdefault(piece.key, np.full(piece.global_shape, np.nan, np.float32))
        target[piece.box.slices] = piece.tensor.numpy().reshape(piece.box.shape)
    np.savez(folder / "whole.npz", **whole)
    (folder / "next.json").write_text(json.dumps(take_steps(engine, mesh, HALF, STEPS)))


def same_bits(engine: Engine, whole: dict[str, np.ndarray]) -> bool:
    """Whether each piece, owned or not, is this part of the whole tensor; every kind of every parameter is expected."""
    return all(
        piece.tensor.numpy().tobytes() == np.ascontiguousarray(whole[piece.key][piece.box.slices]).tobytes()
        for piece in engine.state_pieces()
    )


def load_pair(engine: Engine, mesh: Mesh, folder: Path, source: str, target: str) -> dict:
    """Loads the source's checkpoint and trains on; the same on all ranks but for the bytes read, given for each."""
    store = load(engine, mesh, folder / source)
    is_same = mesh.all_true(same_bits(engine, dict(np.load(folder / "whole.npz"))))
    held = 4 * sum(piece.tensor.numel() for piece in engine.state_pieces())
    return {
        "source": source, "target": target, "same_bits": is_same, "scalars": engine.scalars(),
        "read_bytes": mesh.control_gather(store.read_bytes), "held_bytes": mesh.control_gather(held),
        "next": take_steps(engine, mesh, HALF, STEPS),
    }


def main() -> None:
    folder, plan = Path(sys.argv[1]), json.loads(sys.argv[2])
    info = read_rank_info(dict(os.environ))
    device = join_ranks(info, timeout_s=100)
    torch.set_num_threads(1)
    share_small_parameters()
    if plan["reference"]:
        write_reference(folder, device)
    engines = {name: build(name, info.rank, device) for name in sorted({*plan["relays"], *plan["loads"]})}
    for name in plan["relays"]:
        load(*engines[name], folder / REFERENCE)
        save(*engines[name], folder / name)
    for target, sources in plan["loads"].items():
        for source in sources:
            result = load_pair(*engines[target], folder, source, target)
            if info.rank == 0:
                print(json.dumps(result), flush=True)
    torch.distributed.barrier()
    close_mesh()


if __name__ == "__main__":
    main()
