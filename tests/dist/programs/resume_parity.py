"""Runs one rank of the resume test: trains, saves half-way, loads into a new engine, and compares to the bit.

Arguments: a folder, and a JSON list of cases {zero_stage, dtype, resumed_stage, offload}. Rank 0 prints one JSON result
a case.
"""

import json
import os
import sys
from pathlib import Path

import torch

from megascale.checkpoint.find import find_checkpoint
from megascale.checkpoint.index import RunRecord
from megascale.checkpoint.load import load_pieces
from megascale.checkpoint.local_store import LocalStore
from megascale.checkpoint.retention import Retention
from megascale.checkpoint.save import save_checkpoint
from megascale.checkpoint.state import RunState
from megascale.config.training import PrecisionConfig
from megascale.data.stream import StreamRecord
from megascale.engine.base import EngineSettings
from megascale.engine.build import build_engine
from megascale.model.transformer import build_model
from megascale.parallel.layout import Layout
from megascale.parallel.mesh import build_mesh, close_mesh, read_rank_info
from tests.dist.programs.zero_parity import CLIP, LEARNING_RATE, ROWS, SEQ_LEN, adamw, objective
from tests.support.tiny import ODD_GPT2, batch_of_rows, random_rows, share_small_parameters

HALF, STEPS = 4, 8
RECORD = RunRecord("run", {}, "config", StreamRecord({}, ()), {}, {}, ())


def new_engine(zero_stage: int, dtype: str, mesh, seed: int, offload: str = "none"):
    """An engine over a model that only the seed decides; a resumed one starts from another seed."""
    model = build_model(ODD_GPT2, seed)
    precision = PrecisionConfig(dtype=dtype, initial_loss_scale_log2=24, loss_scale_window_steps=3)
    settings = EngineSettings(zero_stage, CLIP, micro_batch_size=2, offload_optimizer=offload)
    return build_engine(model, adamw(model), objective, mesh, precision, settings, model.placements())


def take_steps(engine, mesh, first: int, stop: int) -> list[tuple]:
    """(loss, gradient norm, loss scale, skipped) of the steps [first, stop)."""
    outputs, share = [], ROWS // mesh.layout.dp
    for step in range(first, stop):
        rows = random_rows(ODD_GPT2.vocab_size, ROWS, SEQ_LEN, seed=step)
        own = range(mesh.dp_rank * share, (mesh.dp_rank + 1) * share)
        micro_batches = [batch_of_rows(rows, own[start : start + 2]) for start in range(0, share, 2)]
        num_tokens = int((rows.labels != -100).sum())
        output = engine.train_step(micro_batches, step=step, num_tokens=num_tokens, learning_rate=LEARNING_RATE)
        outputs.append((output.loss, output.grad_norm, output.loss_scale, output.is_skipped))
    return outputs


def bits(engine) -> dict[tuple, bytes]:
    """Every piece that lives on this rank, to the bit."""
    return {(piece.key, piece.box): piece.tensor.cpu().numpy().tobytes() for piece in engine.state_pieces()}


def run_case(case: dict, folder: Path, mesh) -> dict:
    first = new_engine(case["zero_stage"], case["dtype"], mesh, seed=1, offload=case.get("offload", "none"))
    outputs = take_steps(first, mesh, 0, HALF)
    state = RunState.at_start()
    state = type(state)(**{**vars(state), "step": HALF, "optimizer_scalars": first.scalars()})
    save_checkpoint(LocalStore(folder), RECORD, state, first.state_pieces(), comm=mesh, retention=Retention(1))
    outputs += take_steps(first, mesh, HALF, STEPS)

    second = new_engine(case["resumed_stage"], case["dtype"], mesh, seed=2, offload=case.get("offload", "none"))
    take_steps(second, mesh, STEPS, STEPS + 1)  # whatever it holds by then must be gone after loading
    found = find_checkpoint(LocalStore(folder), run_id="run", comm=mesh)
    load_pieces(found, second.state_pieces(), comm=mesh)
    second.restore_scalars(found.index.state.optimizer_scalars)
    resumed = take_steps(second, mesh, HALF, STEPS)
    same_layout = case["zero_stage"] == case["resumed_stage"]
    return {
        **case,
        "outputs_equal": resumed == outputs[HALF:],
        "state_equal": mesh.all_true(bits(first) == bits(second)) if same_layout else None,
        "loss_gap": max(abs(a[0] - b[0]) for a, b in zip(resumed, outputs[HALF:], strict=True)),
        "skipped": [output[3] for output in outputs],
        "scalars_equal": first.scalars() == second.scalars(),
    }


def main() -> None:
    share_small_parameters()
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    info = read_rank_info(dict(os.environ))
    mesh = build_mesh(Layout(dp=info.world_size), info, timeout_s=60)
    torch.set_num_threads(1)
    for number, case in enumerate(cases):
        result = run_case(case, folder / str(number), mesh)
        if mesh.rank == 0:
            print(json.dumps(result), flush=True)
    mesh.barrier()
    close_mesh()


if __name__ == "__main__":
    main()
