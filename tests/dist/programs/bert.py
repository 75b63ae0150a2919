"""Runs one rank of BERT's layout parity: each fp32 case against a plain loop in fp64 over the same masked rows.

Arguments: a JSON list of names of `CASES`, all with as many ranks as this run has. Rank 0 prints one JSON a case:
{name, loss_gap, norm_gap, eval_gap, min_norm}. The plain loop sums the losses of tokens and of pairs by torch's own
cross-entropy, from logits.
"""

import json
import os
import sys

import torch
import torch.nn.functional as F

from megascale.config.bert_rules import masked_tokens
from megascale.config.derive import derive
from megascale.config.schema import RunConfig
from megascale.data.batch import Batch
from megascale.model.context import build_context
from megascale.model.dropout import derive_row_keys
from megascale.model.transformer import Transformer, build_model
from megascale.parallel.mesh import Mesh, close_mesh, join_ranks, lay_out_mesh, read_rank_info
from megascale.train.build import build_run_engine, layout_of
from tests.support.bert_rows import batch_of, build_test_masked
from tests.support.layouts import ADAM_EPS, CLIP_NORM, LEARNING_RATE, ROWS, SEED, LayoutCase, case_config
from tests.support.tiny import gap, share_small_parameters

STEPS = 6
PAIRS = {"objective": {"pair_task": "sop", "mask_fraction": 0.3}}
NEXT = {"objective": {"pair_task": "nsp", "mask_fraction": 0.3, "whole_word": True}}
DOCUMENTS = {"document_mask": True, "objective": {"mask_fraction": 0.3}}
CASES = {case.name: case for case in [
    LayoutCase("tp2", 2, {"tp": 2}, "bert_pairs", data=NEXT),
    LayoutCase("tp2_without_sequence_shards", 2, {"tp": 2, "sequence_parallel": False}, "bert_pairs", data=PAIRS),
    LayoutCase("pp2", 2, {"pp": 2}, "bert_pairs", data=PAIRS),
    LayoutCase("cp2_ring", 2, {"cp": 2}, "bert_pairs", data=PAIRS),
    LayoutCase("cp2_ring_documents", 2, {"cp": 2}, "bert", data=DOCUMENTS),
    LayoutCase("cp2_ulysses", 2, {"cp": 2, "context_attention": "ulysses"}, "bert_pairs", data=NEXT),
    LayoutCase("zero2", 2, {"zero_stage": 2}, "bert_pairs", data=PAIRS, train={"micro_batch_size": 1}),
    LayoutCase("zero3", 2, {"zero_stage": 3}, "bert_pairs", data=PAIRS),
    LayoutCase("cp2_zero3", 2, {"cp": 2, "zero_stage": 3}, "bert_pairs", data=PAIRS),
    LayoutCase("tp2_pp2_dp2", 8, {"tp": 2, "pp": 2}, "bert_pairs", data=NEXT),
]}

Curve = list[tuple[float, float]]
"""(loss, gradient norm) of each step; the last entry is (evaluation loss sum / 100, 1)."""


def plain_loss(model: Transformer, batch: Batch, step: int, pair_weight: float) -> torch.Tensor:
    """Sum of the losses of all rows, from logits."""
    keys_B = derive_row_keys(batch.row_numbers_B, SEED, step) if model.config.dropout else None
    context = build_context(
        model.config, batch.tokens_BT.shape[1], torch.device("cpu"), documents_BT=batch.documents_BT,
        row_keys_B=keys_B, segments_BT=batch.segments_BT,
    )
    (stage,) = model.stages
    hidden = batch.tokens_BT
    for layer in stage.layers:
        hidden = layer(hidden, context)
    labels_BT = torch.where(batch.labels_BT < 0, -100, batch.labels_BT)
    loss = F.cross_entropy(stage.head(hidden, context).flatten(0, 1), labels_BT.flatten(), reduction="sum")
    if stage.head.pairs is None:
        return loss
    classes_B = -1 - batch.labels_BT[:, 0]
    classes_B = torch.where((classes_B == 0) | (classes_B == 1), classes_B, -100)
    return loss + pair_weight * F.cross_entropy(stage.head.pairs(hidden), classes_B, reduction="sum")


def plain_run(config: RunConfig) -> Curve:
    """A plain single-process loop, in fp64."""
    model, curve, masked = build_model(config.model, SEED).double(), [], build_test_masked(config)
    vocab_size, weight = config.model.vocab_size, masked_tokens(config)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=ADAM_EPS)
    for step in range(STEPS):
        batch = batch_of(masked, vocab_size, step, range(ROWS))
        loss = plain_loss(model, batch, step, weight) / int((batch.labels_BT >= 0).sum())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        curve.append((loss.item(), norm.item()))
    with torch.no_grad():
        evaluated = plain_loss(model.eval(), batch_of(masked, vocab_size, STEPS, range(ROWS)), 0, weight)
    return [*curve, (evaluated.item() / 100, 1.0)]


def laid_out_run(case: LayoutCase, config: RunConfig, mesh: Mesh) -> Curve:
    """The same through the run's own engine."""
    derived, masked = derive(config, case.ranks, case.name), build_test_masked(config)
    engine, curve, size = build_run_engine(config, mesh), [], config.train.micro_batch_size
    share = ROWS // derived.dp
    first = mesh.dp_rank * share

    def micro_batches(step: int) -> list[Batch]:
        starts = range(first, first + share, size)
        return [batch_of(masked, config.model.vocab_size, step, range(start, start + size)) for start in starts]

    for step in range(STEPS):
        own = sum(int((batch.labels_BT >= 0).sum()) for batch in micro_batches(step))
        (num_tokens,) = mesh.control_sum([own if mesh.leads_replica else 0])
        output = engine.train_step(
            micro_batches(step), step=step, num_tokens=int(num_tokens), learning_rate=LEARNING_RATE)
        curve.append((output.loss, output.grad_norm))
    (evaluated,) = mesh.control_sum([engine.evaluate(micro_batches(STEPS))], dtype=torch.float64)
    return [*curve, (evaluated / 100, 1.0)]


def main() -> None:
    info = read_rank_info(dict(os.environ))
    device = join_ranks(info, timeout_s=100)
    torch.set_num_threads(1)
    share_small_parameters()
    for case in (CASES[name] for name in json.loads(sys.argv[1])):
        config = case_config(case)
        layout = layout_of(config, derive(config, case.ranks, case.name))
        curve = laid_out_run(case, config, lay_out_mesh(layout, info.rank, device))
        if info.rank == 0:
            plain = plain_run(config)
            gaps = [[gap(a[i], b[i]) for a, b in zip(plain, curve, strict=True)] for i in (0, 1)]
            print(json.dumps({
                "name": case.name, "loss_gap": max(gaps[0][:-1]), "norm_gap": max(gaps[1]), "eval_gap": gaps[0][-1],
                "min_norm": min(norm for _, norm in plain[:-1]),
            }), flush=True)
    torch.distributed.barrier()
    close_mesh()


if __name__ == "__main__":
    main()
