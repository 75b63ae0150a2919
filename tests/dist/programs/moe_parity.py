"""Runs one rank of the parity of expert layers: each case against a plain loop in fp64 over the same rows.

Arguments: a JSON list of case names of `CASES`, all with as many ranks as this run has. Rank 0 prints one JSON result a
case: {name, loss_gap, norm_gap, eval_gap, figure_gap, bias_gap}.
"""

import json
import os
import sys
from contextlib import nullcontext

import torch
import torch.nn.functional as F

from bench.comm_counter import CommCounter
from megascale.config.derive import derive
from megascale.config.model import ModelConfig
from megascale.config.schema import RunConfig
from megascale.model.context import build_context
from megascale.model.moe.balance import move_bias
from megascale.model.moe.layer import MoeLayer
from megascale.model.moe.router import router_biases
from megascale.model.transformer import Transformer, build_model
from megascale.parallel.mesh import Mesh, close_mesh, join_ranks, lay_out_mesh, read_rank_info
from megascale.train.build import build_run_engine, layout_of
from tests.support import layouts
from tests.support.layouts import ADAM_EPS, CLIP_NORM, LEARNING_RATE, ROWS, SEED, SEQ_LEN, LayoutCase, case_config
from tests.support.tiny import batch_of_rows, gap, random_rows, share_small_parameters

STEPS = 4
SHAPE = {"family": "moe", "num_kv_heads": 2, "d_ff": 24}
EXPERTS = {
    "mixtral": {"num_experts": 4, "top_k": 2, "balance_weight": 0.1, "z_weight": 0.01},
    "dropping": {"num_experts": 4, "top_k": 2, "capacity_factor": 0.75, "balance_weight": 0.1},
    "deepseek": {"num_experts": 8, "top_k": 3, "d_expert": 8, "num_shared_experts": 2, "num_dense_layers": 1,
                 "scores": "sigmoid", "balance": "bias", "bias_rate": 0.01, "z_weight": 0.01},
}
layouts.MODELS |= {name: SHAPE | {"num_layers": 2, "moe": moe} for name, moe in EXPERTS.items()}
layouts.MODELS["mixtral_deep"] = SHAPE | {"num_layers": 4, "moe": EXPERTS["mixtral"]}
RECOMPUTED, ROW_BY_ROW = {"recompute": "full"}, {"micro_batch_size": 1}
CASES = {case.name: case for case in [
    LayoutCase("tp2_without_sequence_shards", 2, {"tp": 2, "sequence_parallel": False}, "mixtral"),
    LayoutCase("tp2_deepseek_recompute", 2, {"tp": 2}, "deepseek", train=RECOMPUTED),
    LayoutCase("pp2_recompute", 2, {"pp": 2}, "mixtral", train=RECOMPUTED),
    LayoutCase("cp2_ring_dropping", 2, {"cp": 2}, "dropping"),
    LayoutCase("cp2_ulysses_deepseek", 2, {"cp": 2, "context_attention": "ulysses"}, "deepseek"),
    LayoutCase("dp2_zero2", 2, {"zero_stage": 2}, "mixtral"),
    LayoutCase("dp2_zero3_deepseek", 2, {"zero_stage": 3}, "deepseek", train={"recompute": "selective"}),
    LayoutCase("ep2", 2, {"ep": 2}, "mixtral", train={"recompute": "selective"}),
    LayoutCase("ep2_dropping", 2, {"ep": 2}, "dropping", train=ROW_BY_ROW),
    LayoutCase("ep4_deepseek", 4, {"ep": 4, "cp": 2}, "deepseek"),
    LayoutCase("pp2_dp2_zero_bubble", 4, {"pp": 2, "schedule": "zero_bubble"}, "mixtral_deep", train=ROW_BY_ROW),
    LayoutCase("tp2_dp2_zero3", 4, {"tp": 2, "zero_stage": 3}, "mixtral"),
]}


def plain_loss(model: Transformer, rows, factor: float | None) -> torch.Tensor:
    """Sum of the loss over all rows; with a factor the losses of the routers join in the backward pass."""
    batch = batch_of_rows(rows, range(ROWS))
    context = build_context(
        model.config, SEQ_LEN, torch.device("cpu"), num_labels_B=(batch.labels_BT >= 0).sum(1),
        loss_factor=None if factor is None else torch.tensor(factor, dtype=torch.float64),
    )
    logits_NV = model(batch.tokens_BT, context).flatten(0, 1)
    return F.cross_entropy(logits_NV, batch.labels_BT.flatten(), ignore_index=-100, reduction="sum")


def plain_run(config: ModelConfig) -> tuple[list, dict[str, float], dict[str, list]]:
    """(loss, norm) of each step, the figures over all steps, and the biases at the end."""
    model, curve = build_model(config, SEED).double(), []
    layers = {name.split(".")[1]: layer for name, layer in model.named_modules() if isinstance(layer, MoeLayer)}
    totals, labels = {}, 0
    matrices, vectors = ([p for p in model.parameters() if (p.dim() >= 2) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=ADAM_EPS)
    for step in range(STEPS):
        rows = random_rows(config.vocab_size, ROWS, SEQ_LEN, seed=step)
        num_tokens = int((rows.labels != -100).sum())
        loss = plain_loss(model, rows, 1 / num_tokens) / num_tokens
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        curve.append((loss.item(), norm.item()))
        labels += num_tokens
        for name, layer in layers.items():
            counts, sums = layer.tally.take()
            before = totals.get(name, (0, 0))
            totals[name] = before[0] + counts, before[1] + sums
            if layer.router.bias is not None:
                move_bias(layer.router.bias, counts[:-1], config.moe.bias_rate)
    with torch.no_grad():
        rows = random_rows(config.vocab_size, ROWS, SEQ_LEN, seed=STEPS)
        curve.append((plain_loss(model.eval(), rows, None).item() / 100, 1.0))
    figures = {}
    for name, (counts, sums) in totals.items():
        total = counts[:-1].sum().item()
        figures |= {
            f"experts/{name}/load_max": counts[:-1].max().item() * config.moe.num_experts / total,
            f"experts/{name}/dropped_fraction": counts[-1].item() / total,
            f"experts/{name}/balance_loss": sums[0].item() / labels,
            f"experts/{name}/z_loss": sums[1].item() / labels,
        }
    biases = {f"blocks.{name}.feed_forward.router.bias": layer.router.bias.tolist()
              for name, layer in layers.items() if layer.router.bias is not None}
    return curve, figures, biases


def laid_out_run(case: LayoutCase, config: RunConfig, mesh: Mesh) -> tuple[list, dict, dict]:
    """The same through the run's own engine; of the biases those of this rank."""
    derived = derive(config, case.ranks, case.name)
    engine = build_run_engine(config, mesh)
    share, curve, size = ROWS // derived.dp, [], config.train.micro_batch_size
    own = range(mesh.dp_rank * share, (mesh.dp_rank + 1) * share)

    def micro_batches(rows) -> list:
        return [batch_of_rows(rows, own[start : start + size]) for start in range(0, share, size)]

    counter = CommCounter({mesh.ep.name: "ep"})
    for step in range(STEPS):
        rows = random_rows(config.model.vocab_size, ROWS, SEQ_LEN, seed=step)
        num_tokens = int((rows.labels != -100).sum())
        with counter if step == 0 else nullcontext():
            output = engine.train_step(
                micro_batches(rows), step=step, num_tokens=num_tokens, learning_rate=LEARNING_RATE
            )
        curve.append((output.loss, output.grad_norm))
    if config.train.recompute == "none" and config.model.moe.capacity_factor is None:
        (sent,) = mesh.control_sum([counter.sent["ep", "all_to_all"]], dtype=torch.float64)
        assert sent == exchanged_bytes(config, share // size, case.ranks), (sent, case.name)
    rows = random_rows(config.model.vocab_size, ROWS, SEQ_LEN, seed=STEPS)
    (evaluated,) = mesh.control_sum([engine.evaluate(micro_batches(rows))], dtype=torch.float64)
    pieces = list(engine.state_pieces())
    biases = {piece.key.removeprefix("buffer/"): piece.tensor.tolist()
              for piece in pieces if piece.key.startswith("buffer/")}
    check_every_element_is_owned_once(pieces, config.model, mesh)
    return [*curve, (evaluated / 100, 1.0)], engine.figures(), biases


def exchanged_bytes(config: RunConfig, num_micro_batches: int, ranks: int) -> float:
    """What a step sends over ep, over all ranks, in fp32 without drops: each token K times to its experts and back, and
    the gradients likewise, each tp rank for itself; and in each micro-batch the counts of the experts.
    """
    parallel, model, moe = config.parallel, config.model, config.model.moe
    num_sparse = len(model.sparse_blocks)
    pairs = 4 * ROWS * SEQ_LEN * parallel.tp * moe.top_k * model.d_model * 4
    counts = num_micro_batches * (ranks // parallel.pp) * moe.num_experts * 8
    return num_sparse * (pairs + counts) * (parallel.ep - 1) / parallel.ep


def check_every_element_is_owned_once(pieces: list, config: ModelConfig, mesh: Mesh) -> None:
    """Three kinds of state of each parameter, and one of each bias."""
    (owned,) = mesh.control_sum([sum(piece.box.numel for piece in pieces if piece.is_owner)])
    model = build_model(config, SEED)
    num_biases = sum(bias.numel() for bias in router_biases(model).values())
    assert owned == 3 * sum(parameter.numel() for parameter in model.parameters()) + num_biases


def main() -> None:
    info = read_rank_info(dict(os.environ))
    device = join_ranks(info, timeout_s=100)
    torch.set_num_threads(1)
    share_small_parameters()
    plain = {}
    for case in (CASES[name] for name in json.loads(sys.argv[1])):
        config = case_config(case)
        plain.setdefault(case.model, plain_run(config.model))
        curve, figures, biases = plain[case.model]
        mesh = lay_out_mesh(layout_of(config, derive(config, case.ranks, case.name)), info.rank, device)
        own_curve, own_figures, own_biases = laid_out_run(case, config, mesh)
        gaps = [[gap(a[i], b[i]) for a, b in zip(curve, own_curve, strict=True)] for i in (0, 1)]
        assert own_figures.keys() == figures.keys()
        bias_gap = max((abs(a - b) for name, own in own_biases.items() for a, b in zip(biases[name], own, strict=True)),
                       default=0.0)
        (num_biases,) = mesh.control_sum([len(own_biases)])
        assert bool(num_biases) == bool(biases)
        if info.rank == 0:
            print(json.dumps({
                "name": case.name, "loss_gap": max(gaps[0][:-1]), "norm_gap": max(gaps[1]), "eval_gap": gaps[0][-1],
                "figure_gap": max(gap(figures[name], own) for name, own in own_figures.items()), "bias_gap": bias_gap,
            }), flush=True)
    torch.distributed.barrier()
    close_mesh()


if __name__ == "__main__":
    main()
