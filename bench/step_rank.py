"""One rank of `bench.step_overhead`: trains three equal models side by side and prints the rows of the table.

Argument: the options of `bench.step_overhead` as JSON.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from itertools import cycle, permutations
from statistics import median

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from bench.figures import show_ratios, show_row
from bench.step_overhead import Shape, shape_of
from megascale.config.optimizer import OptimizerConfig
from megascale.config.training import PrecisionConfig
from megascale.data.batch import Batch
from megascale.engine.base import EngineSettings
from megascale.engine.build import build_engine
from megascale.model.axes import ONE_RANK
from megascale.model.flops import num_parameters
from megascale.model.sharding import is_decayed
from megascale.model.transformer import Transformer, build_model
from megascale.optim.groups import ParameterFacts, parameter_groups
from megascale.parallel.layout import Layout
from megascale.parallel.mesh import Mesh, build_mesh, close_mesh, read_rank_info
from megascale.train.objective import token_objective

CLIP_NORM, LEARNING_RATE, SEED = 1.0, 1e-3, 1
WARM_UP_ROUNDS, MIN_ROUNDS = 3, 6
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
"""In nats, over the first steps: the loops must do the same job. bf16 rounds in other places in each."""

Step = Callable[[Batch, int], float]
"""(batch, step) -> this rank's or the global mean loss, after one optimizer step."""


def build_optimizer(model: Transformer) -> torch.optim.AdamW:
    """The AdamW of a run, the same for every loop."""
    facts = {name: ParameterFacts(is_decayed(name), False, 1.0, 1.0) for name, _ in model.named_parameters()}
    groups = parameter_groups(model.named_parameters(), facts, OptimizerConfig(learning_rate=LEARNING_RATE))
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, fused=True)


def our_step(shape: Shape, dtype: str, zero_stage: int, mesh: Mesh) -> Step:
    """The step of a run, by its own engine."""
    model = build_model(shape.model, SEED)
    objective = token_objective(shape.model, SEED, ONE_RANK, has_document_mask=False)
    settings = EngineSettings(zero_stage=zero_stage, clip_norm=CLIP_NORM, micro_batch_size=shape.rows)
    engine = build_engine(
        model, build_optimizer(model), objective, mesh, PrecisionConfig(dtype=dtype), settings, model.placements()
    )
    num_tokens = shape.rows * shape.seq_len * mesh.layout.dp

    def step(batch: Batch, number: int) -> float:
        return engine.train_step([batch], step=number, num_tokens=num_tokens, learning_rate=LEARNING_RATE).loss

    return step


def plain_step(shape: Shape, dtype: str, mesh: Mesh) -> Step:
    """The step of a loop by hand: torch's cross-entropy, DistributedDataParallel over ranks, autocast for bf16."""
    model = build_model(shape.model, SEED).to(mesh.device)
    optimizer = build_optimizer(model)
    objective = token_objective(shape.model, SEED, ONE_RANK, has_document_mask=False)
    module = DistributedDataParallel(model, gradient_as_bucket_view=True) if mesh.layout.dp > 1 else model
    num_tokens = shape.rows * shape.seq_len

    def step(batch: Batch, number: int) -> float:
        with torch.autocast(mesh.device.type, torch.bfloat16, enabled=dtype == "bf16"):
            tokens_BT, context, labels_BT = objective(batch.to(mesh.device), number, None)
            logits_NV = module(tokens_BT, context).flatten(0, 1)
            loss = F.cross_entropy(logits_NV.float(), labels_BT.flatten(), reduction="sum") / num_tokens
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def random_batch(shape: Shape, mesh: Mesh, number: int) -> Batch:
    """Random rows, others on each rank and in each step."""
    generator = torch.Generator().manual_seed(number * mesh.world_size + mesh.rank)
    tokens = torch.randint(0, shape.model.vocab_size, (shape.rows, shape.seq_len + 1), generator=generator)
    rows = torch.arange(shape.rows)
    inputs_BT, labels_BT = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return Batch(inputs_BT, labels_BT, torch.zeros_like(inputs_BT, dtype=torch.int32), rows)


def timed(step: Step, batch: Batch, number: int, mesh: Mesh) -> tuple[float, float]:
    """(seconds, loss) of one step that all ranks begin together."""
    mesh.barrier()
    started_s = time.perf_counter()
    loss = step(batch, number)
    if mesh.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started_s, loss


def run_rounds(steps: dict[str, Step], shape: Shape, mesh: Mesh, seconds: float, tolerance: float) -> dict[str, list]:
    """Seconds of each step of each loop: round after round, a step of each, in every order in turn."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    orders = cycle(permutations(steps))
    number, deadline = 0, float("inf")
    while number < WARM_UP_ROUNDS + MIN_ROUNDS or mesh.all_true(time.monotonic() < deadline):
        batch, losses = random_batch(shape, mesh, number), {}
        for name in next(orders):
            elapsed_s, losses[name] = timed(steps[name], batch, number, mesh)
            times[name].append(elapsed_s)
        if number < WARM_UP_ROUNDS:
            check_losses(losses, mesh, tolerance)
            deadline = time.monotonic() + seconds
        number += 1
    return {name: found[WARM_UP_ROUNDS:] for name, found in times.items()}


def check_losses(losses: dict[str, float], mesh: Mesh, tolerance: float) -> None:
    """Stops the bench when the loops don't train alike: their times couldn't be compared."""
    means = mesh.control_sum(list(losses.values()), dtype=torch.float64)
    assert max(means) - min(means) <= tolerance * mesh.world_size, f"the loops differ: {losses}"


def measure(name: str, dtype: str, zero_stage: int, mesh: Mesh, seconds: float) -> str:
    """One row of the table."""
    shape = shape_of(name)
    steps = {
        "ours": our_step(shape, dtype, zero_stage, mesh),
        "other": plain_step(shape, dtype, mesh),
        "again": plain_step(shape, dtype, mesh),
    }
    times = run_rounds(steps, shape, mesh, seconds, LOSS_TOLERANCE[dtype])
    ours, again = (
        show_ratios(a / b for a, b in zip(times[loop], times["other"], strict=True)) for loop in ("ours", "again")
    )
    other_ms = f"{1e3 * median(times['other']):.1f}"
    parameters = f"{num_parameters(shape.model) / 1e6:.2f} M"
    return show_row((mesh.world_size, name, parameters, dtype, zero_stage, other_ms, ours, again, len(times["other"])))


def main() -> None:
    options = json.loads(sys.argv[1])
    info = read_rank_info(dict(os.environ))
    torch.set_num_threads(1)
    mesh = build_mesh(Layout(dp=info.world_size), info, timeout_s=120)
    for name in options["shapes"]:
        for dtype in options["dtypes"]:
            for zero_stage in options["zero_stages"]:
                row = measure(name, dtype, zero_stage, mesh, options["seconds"])
                if mesh.rank == 0:
                    print(row, flush=True)
    mesh.barrier()
    close_mesh()


if __name__ == "__main__":
    main()
