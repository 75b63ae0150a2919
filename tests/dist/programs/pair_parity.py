"""One rank of layouts of encoder-decoders: each against a plain loop in fp64 over the same rows.

Arguments: a JSON list of case names of `tests.support.pairs`, all with as many ranks as this run has. Rank 0 prints one
JSON result a case: {name, loss_gap, norm_gap, eval_gap, min_norm}.
"""

import json
import os
import sys

import torch
import torch.nn.functional as F

from megascale.config.derive import derive
from megascale.config.schema import RunConfig
from megascale.model.axes import ONE_RANK
from megascale.model.transformer import Transformer, build_model
from megascale.parallel.mesh import Mesh, close_mesh, join_ranks, lay_out_mesh, read_rank_info
from megascale.train.build import build_run_engine, layout_of
from megascale.train.objective import run_objective
from tests.dist.programs.layout_parity import check_every_element_is_owned_once
from tests.support.layouts import ADAM_EPS, LayoutCase
from tests.support.pairs import CASES, CLIP_NORM, LEARNING_RATE, ROWS, SEED, STEPS, case_config, pair_batch
from tests.support.tiny import gap, share_small_parameters

Curve = list[tuple[float, float]]


def plain_loss(model: Transformer, config: RunConfig, step: int, seed: int) -> torch.Tensor:
    """Sum of the loss over all rows in one forward pass: logits, then torch's own cross-entropy."""
    batch = pair_batch(seed, range(ROWS))
    inputs, context, labels = run_objective(config, ONE_RANK)(batch, step, None)
    smoothing = config.data.objective.label_smoothing if model.training else 0.0
    logits_NV = model(inputs, context).flatten(0, 1)[:, : config.model.vocab_size]
    return F.cross_entropy(
        logits_NV, labels.flatten(), ignore_index=-100, reduction="sum", label_smoothing=smoothing
    )


def plain_run(config: RunConfig) -> Curve:
    """A plain loop in fp64: only the curve under test has rounding to speak of."""
    model, curve = build_model(config.model, SEED).double(), []
    named = list(model.named_parameters())
    tables = [parameter for name, parameter in named if parameter.dim() >= 2 and "relative_bias" not in name]
    rest = [parameter for name, parameter in named if parameter.dim() < 2 or "relative_bias" in name]
    groups = [{"params": tables, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=ADAM_EPS)
    for step in range(STEPS):
        num_tokens = int((pair_batch(step, range(ROWS)).labels_BT >= 0).sum())
        loss = plain_loss(model, config, step, step) / num_tokens
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        curve.append((loss.item(), norm.item()))
    with torch.no_grad():
        return [*curve, (plain_loss(model.eval(), config, 0, STEPS).item() / 100, 1.0)]


def laid_out_run(case: LayoutCase, mesh: Mesh) -> Curve:
    """The same through the run's own engine."""
    config = case_config(case)
    derived = derive(config, case.ranks, case.name)
    engine = build_run_engine(config, mesh)
    share, curve = ROWS // derived.dp, []

    def micro_batches(seed: int) -> list:
        first = mesh.dp_rank * share
        return [pair_batch(seed, range(row, row + 1)) for row in range(first, first + share)]

    for step in range(STEPS):
        num_tokens = int((pair_batch(step, range(ROWS)).labels_BT >= 0).sum())
        output = engine.train_step(
            micro_batches(step), step=step, num_tokens=num_tokens, learning_rate=LEARNING_RATE
        )
        curve.append((output.loss, output.grad_norm))
    (evaluated,) = mesh.control_sum([engine.evaluate(micro_batches(STEPS))], dtype=torch.float64)
    check_every_element_is_owned_once(engine, config.model, mesh)
    return [*curve, (evaluated / 100, 1.0)]


def main() -> None:
    info = read_rank_info(dict(os.environ))
    device = join_ranks(info, timeout_s=300)
    torch.set_num_threads(1)
    share_small_parameters()
    plain: dict[tuple, Curve] = {}
    for case in (CASES[name] for name in json.loads(sys.argv[1])):
        config = case_config(case)
        key = case.model, config.data.objective.label_smoothing
        if key not in plain:
            plain[key] = plain_run(config)
        curve = laid_out_run(case, lay_out_mesh(layout_of(config, derive(config, case.ranks)), info.rank, device))
        gaps = [[gap(a[i], b[i]) for a, b in zip(plain[key], curve, strict=True)] for i in (0, 1)]
        if info.rank == 0:
            print(json.dumps({
                "name": case.name, "loss_gap": max(gaps[0][:-1]), "norm_gap": max(gaps[1]), "eval_gap": gaps[0][-1],
                "min_norm": min(norm for _, norm in plain[key][:-1]),
            }), flush=True)
    torch.distributed.barrier()
    close_mesh()


if __name__ == "__main__":
    main()
