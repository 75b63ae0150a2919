"""Runs one rank of the test of expert checkpoints: trains in one layout, saves, and goes on from there in others.

Arguments: a folder, and a JSON object: name of the source layout -> names of the targets, of `tests.support.layouts` or
`BIASED`, all with as many ranks as this run has. Rank 0 prints one JSON result a target.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

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
from megascale.parallel.mesh import Mesh, RankInfo, close_mesh, join_ranks, lay_out_mesh, read_rank_info
from megascale.train.build import build_run_engine, layout_of
from tests.support import layouts
from tests.support.layouts import CASES, EXPERTS, LEARNING_RATE, MODELS, ROWS, SEQ_LEN, LayoutCase, case_config
from tests.support.tiny import batch_of_rows, random_rows

HALF, STEPS = 3, 5
RECORD = RunRecord("run", {}, "config", StreamRecord({}, ()), {}, {}, ())
layouts.MODELS["moe_bias"] = MODELS["moe"] | {"moe": EXPERTS | {"balance": "bias", "bias_rate": 0.01}}
BIASED = {name: LayoutCase(name, 4, parallel, "moe_bias") for name, parallel in
          [("ep2_bias", {"ep": 2}), ("dp4_bias", {})]}
"""The plain loop of `layout_parity.py` moves no biases, so these aren't in its table."""


def build(name: str, info: RankInfo, device: torch.device) -> tuple[Engine, Mesh, int]:
    """The engine of a layout, and the rows of its micro-batches."""
    case = (CASES | BIASED)[name]
    config = case_config(case)
    mesh = lay_out_mesh(layout_of(config, derive(config, case.ranks, name)), info.rank, device)
    return build_run_engine(config, mesh), mesh, config.train.micro_batch_size


def take_steps(engine: Engine, mesh: Mesh, size: int, first: int, stop: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of the steps [first, stop)."""
    outputs, share = [], ROWS // mesh.layout.dp
    for step in range(first, stop):
        rows = random_rows(61, ROWS, SEQ_LEN, seed=step)
        own = range(mesh.dp_rank * share, (mesh.dp_rank + 1) * share)
        output = engine.train_step(
            [batch_of_rows(rows, own[start : start + size]) for start in range(0, share, size)],
            step=step, num_tokens=int((rows.labels != -100).sum()), learning_rate=LEARNING_RATE,
        )
        outputs.append((output.loss, output.grad_norm))
    return outputs


def bits(engine: Engine) -> dict[tuple, bytes]:
    """Every piece that lives on this rank, to the bit."""
    return {(piece.key, piece.box): piece.tensor.numpy().tobytes() for piece in engine.state_pieces()}


def biases(engine: Engine) -> dict[str, list[float]]:
    """The biases of the routers, of `balance: bias`."""
    return {piece.key: piece.tensor.tolist() for piece in engine.state_pieces() if piece.key.startswith("buffer/")}


def resume(name: str, folder: Path, info: RankInfo, device: torch.device) -> tuple[Engine, Mesh, list]:
    """Loads into an engine that holds something else by then, and goes on."""
    engine, mesh, size = build(name, info, device)
    take_steps(engine, mesh, size, STEPS, STEPS + 1)
    found = find_checkpoint(LocalStore(folder), run_id="run", comm=mesh)
    load_pieces(found, engine.state_pieces(), comm=mesh)
    engine.restore_scalars(found.index.state.optimizer_scalars)
    return engine, mesh, take_steps(engine, mesh, size, HALF, STEPS)


def main() -> None:
    folder, pairs = Path(sys.argv[1]), json.loads(sys.argv[2])
    info = read_rank_info(dict(os.environ))
    device = join_ranks(info, timeout_s=100)
    torch.set_num_threads(1)
    for source, targets in pairs.items():
        first, mesh, size = build(source, info, device)
        take_steps(first, mesh, size, 0, HALF)
        state = replace(RunState.at_start(), step=HALF, optimizer_scalars=first.scalars())
        store = LocalStore(folder / source)
        save_checkpoint(store, RECORD, state, first.state_pieces(), comm=mesh, retention=Retention(1))
        expected = take_steps(first, mesh, size, HALF, STEPS)
        for target in targets:
            second, own_mesh, outputs = resume(target, folder / source, info, device)
            is_equal = own_mesh.all_true(target != source or bits(first) == bits(second))
            if info.rank == 0:
                pairs_of_steps = zip(expected, outputs, strict=True)
                gap = max(abs(a - b) for old, new in pairs_of_steps for a, b in zip(old, new, strict=True))
                print(json.dumps({
                    "source": source, "target": target, "gap": gap, "outputs_equal": outputs == expected,
                    "state_equal": is_equal, "biases": [biases(first), biases(second)],
                }), flush=True)
    torch.distributed.barrier()
    close_mesh()


if __name__ == "__main__":
    main()
