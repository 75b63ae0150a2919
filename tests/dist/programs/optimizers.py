"""Runs one rank of the optimizer tests: each case against a plain fp64 loop, saved half-way and resumed elsewhere.

Arguments: a folder, and a JSON list of cases {name, model, optimizer, parallel, resumed}. Rank 0 prints one JSON result
a case: gaps to the plain loop of losses, norms and the loss of the averaged weights; the same of the resumed run.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from megascale.checkpoint.find import find_checkpoint
from megascale.checkpoint.index import RunRecord
from megascale.checkpoint.load import load_pieces
from megascale.checkpoint.local_store import LocalStore
from megascale.checkpoint.retention import Retention
from megascale.checkpoint.save import save_checkpoint
from megascale.checkpoint.state import RunState
from megascale.config.derive import derive
from megascale.config.schema import RunConfig
from megascale.data.stream import StreamRecord
from megascale.model.context import build_context
from megascale.model.transformer import build_model, parameter_shapes
from megascale.optim.state import EMA
from megascale.parallel.mesh import Mesh, close_mesh, join_ranks, lay_out_mesh, read_rank_info
from megascale.train.build import build_run_engine, build_run_optimizer, layout_of
from tests.support.layouts import CLIP_NORM, ROWS, SEQ_LEN, LayoutCase, case_config
from tests.support.tiny import batch_of_rows, gap, random_rows, share_small_parameters

STEPS, HALF, RATE = 6, 3, 3e-3
RECORD = RunRecord("run", {}, "config", StreamRecord({}, ()), {}, {}, ())


def config_of(case: dict, parallel: dict, ranks: int) -> RunConfig:
    base = case_config(LayoutCase(case["name"], ranks, parallel, case["model"])).model_dump()
    base["optimizer"] |= {"ema_decay": 0.5} | case["optimizer"]
    base["model"] |= case.get("shape", {})
    return RunConfig.model_validate(base)


def plain_loss(model, step: int) -> tuple[torch.Tensor, int]:
    batch = batch_of_rows(random_rows(model.config.vocab_size, ROWS, SEQ_LEN, seed=step), range(ROWS))
    logits_NV = model(batch.tokens_BT, build_context(model.config, SEQ_LEN, torch.device("cpu"))).flatten(0, 1)
    loss = F.cross_entropy(logits_NV, batch.labels_BT.flatten(), ignore_index=-100, reduction="sum")
    return loss, int((batch.labels_BT >= 0).sum())


def plain_run(config: RunConfig) -> list[tuple[float, float]]:
    """(loss, norm) of each step; at last (loss of the averaged weights, 1)."""
    model = build_model(config.model, config.run.seed).double()
    optimizer = build_run_optimizer(config, model.named_parameters(), parameter_shapes(config.model))
    curve = []
    for step in range(STEPS):
        loss, num_tokens = plain_loss(model, step)
        (loss / num_tokens).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        for group in optimizer.param_groups:
            group["lr"] = RATE * group["lr_factor"]
        optimizer.step()
        optimizer.zero_grad()
        curve.append((loss.item() / num_tokens, norm.item()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(optimizer.state[parameter][EMA])
        loss, num_tokens = plain_loss(model, STEPS)
    return [*curve, (loss.item() / num_tokens, 1.0)]


class LaidOut:
    """An engine in a layout, and the steps that it takes."""

    def __init__(self, config: RunConfig, rank: int, ranks: int, device: torch.device):
        derived = derive(config, ranks, "case")
        self.mesh = lay_out_mesh(layout_of(config, derived), rank, device)
        self.engine, self.config = build_run_engine(config, self.mesh), config
        share = ROWS // derived.dp
        self.own = range(self.mesh.dp_rank * share, (self.mesh.dp_rank + 1) * share)

    def batches(self, step: int) -> tuple[list, int]:
        rows, size = random_rows(self.config.model.vocab_size, ROWS, SEQ_LEN, seed=step), 2
        micro_batches = [batch_of_rows(rows, self.own[start : start + size]) for start in range(0, len(self.own), size)]
        return micro_batches, int((rows.labels >= 0).sum())

    def run(self, first: int, stop: int) -> list[tuple[float, float]]:
        curve = []
        for step in range(first, stop):
            micro_batches, num_tokens = self.batches(step)
            output = self.engine.train_step(micro_batches, step=step, num_tokens=num_tokens, learning_rate=RATE)
            curve.append((output.loss, output.grad_norm))
        return curve

    def average_loss(self) -> tuple[float, float]:
        """The loss of the averaged weights; afterwards the weights are what they were."""
        before = bits(self.engine)
        micro_batches, num_tokens = self.batches(STEPS)
        self.engine.swap_average()
        (total,) = self.mesh.control_sum([self.engine.evaluate(micro_batches)], dtype=torch.float64)
        self.engine.swap_average()
        assert bits(self.engine) == before
        return total / num_tokens, 1.0


def bits(engine) -> dict[tuple, bytes]:
    return {(piece.key, piece.box): piece.tensor.cpu().numpy().tobytes() for piece in engine.state_pieces()}


def run_case(case: dict, folder: Path, rank: int, ranks: int, device: torch.device) -> dict:
    first = LaidOut(config_of(case, case["parallel"], ranks), rank, ranks, device)
    plain = plain_run(first.config)
    curve = first.run(0, HALF)
    state = RunState.at_start()
    state = type(state)(**{**vars(state), "step": HALF, "optimizer_scalars": first.engine.scalars()})
    save_checkpoint(
        LocalStore(folder), RECORD, state, first.engine.state_pieces(), comm=first.mesh, retention=Retention(1)
    )
    curve += [*first.run(HALF, STEPS), first.average_loss()]

    second = LaidOut(config_of(case, case["resumed"], ranks), rank, ranks, device)
    second.run(STEPS, STEPS + 1)  # whatever it holds by then must be gone after loading
    resume(second.engine, folder, second.mesh)
    resumed = [*second.run(HALF, STEPS), second.average_loss()]
    same = case["resumed"] == case["parallel"]
    return {
        "name": case["name"],
        "gap": largest_gap(plain, curve), "resumed_gap": largest_gap(plain[HALF:], resumed),
        "moved": abs(plain[0][0] - plain[-2][0]),
        "equal": first.mesh.all_true(bits(first.engine) == bits(second.engine)) if same else None,
    }


def resume(engine, folder: Path, mesh: Mesh) -> None:
    found = find_checkpoint(LocalStore(folder), run_id="run", comm=mesh)
    load_pieces(found, engine.state_pieces(), comm=mesh)
    engine.restore_scalars(found.index.state.optimizer_scalars)


def largest_gap(expected: list[tuple[float, float]], found: list[tuple[float, float]]) -> float:
    return max(gap(a, b) for one, two in zip(expected, found, strict=True) for a, b in zip(one, two, strict=True))


def main() -> None:
    share_small_parameters()
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    info = read_rank_info(dict(os.environ))
    device = join_ranks(info, timeout_s=100)
    torch.set_num_threads(1)
    for case in cases:
        result = run_case(case, folder / case["name"], info.rank, info.world_size, device)
        if info.rank == 0:
            print(json.dumps(result), flush=True)
    torch.distributed.barrier()
    close_mesh()


if __name__ == "__main__":
    main()
