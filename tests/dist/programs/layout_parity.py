"""Runs one rank of the layout parity table: each fp32 case against a plain PyTorch loop in fp64 over the same rows.

Arguments: a JSON list of case names of `tests.support.layouts`, all with as many ranks as this run has. Rank 0 prints
one JSON result a case: {name, loss_gap, norm_gap, eval_gap, min_norm}.
"""

import json
import os
import sys

import torch
import torch.nn.functional as F

from megascale.config.derive import derive
from megascale.config.model import ModelConfig
from megascale.model.context import build_context
from megascale.model.dropout import derive_row_keys
from megascale.model.transformer import Transformer, build_model
from megascale.parallel.mesh import Mesh, close_mesh, join_ranks, lay_out_mesh, read_rank_info
from megascale.train.build import build_run_engine, layout_of
from tests.support.layouts import (
    ADAM_EPS,
    CASES,
    CLIP_NORM,
    LEARNING_RATE,
    ROWS,
    SEED,
    SEQ_LEN,
    STEPS,
    LayoutCase,
    case_config,
)
from tests.support.tiny import batch_of_rows, gap, random_rows, share_small_parameters

Curve = list[tuple[float, float]]
"""(loss, gradient norm) of each step; the last entry is (evaluation loss sum / 100, 1)."""


def plain_loss(
    model: Transformer, rows, has_documents: bool, step: int, factor: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum of the loss over all rows in one forward pass: logits, then torch's own cross-entropy.

    Args:
        factor: of the loss before its backward pass, for layers with a loss of their own.
    """
    batch = batch_of_rows(rows, range(ROWS))
    keys_B = derive_row_keys(batch.row_numbers_B, SEED, step) if model.config.dropout else None
    documents_BT = batch.documents_BT if has_documents else None
    context = build_context(
        model.config, SEQ_LEN, torch.device("cpu"), documents_BT=documents_BT, row_keys_B=keys_B,
        loss_factor=factor, num_labels_B=(batch.labels_BT >= 0).sum(dim=1),
    )
    logits_NV = model(batch.tokens_BT, context).flatten(0, 1)
    return F.cross_entropy(logits_NV, batch.labels_BT.flatten(), ignore_index=-100, reduction="sum")


def plain_run(config: ModelConfig, has_documents: bool) -> Curve:
    """A plain single-process loop, in fp64: of the two curves only the one under test has rounding to speak of."""
    model, curve = build_model(config, SEED).double(), []
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=ADAM_EPS)
    for step in range(STEPS):
        rows = random_rows(config.vocab_size, ROWS, SEQ_LEN, seed=step)
        num_tokens = int((rows.labels != -100).sum())
        factor = torch.tensor(1 / num_tokens, dtype=torch.float64)
        loss = plain_loss(model, rows, has_documents, step, factor) / num_tokens
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        curve.append((loss.item(), norm.item()))
    with torch.no_grad():
        rows = random_rows(config.vocab_size, ROWS, SEQ_LEN, seed=STEPS)
        evaluated = plain_loss(model.eval(), rows, has_documents, 0)
    return [*curve, (evaluated.item() / 100, 1.0)]


def laid_out_run(case: LayoutCase, mesh: Mesh) -> Curve:
    """The same through the run's own engine."""
    config = case_config(case)
    derived = derive(config, case.ranks, case.name)
    engine = build_run_engine(config, mesh)
    share, curve, size = ROWS // derived.dp, [], config.train.micro_batch_size
    own = range(mesh.dp_rank * share, (mesh.dp_rank + 1) * share)

    def micro_batches(rows) -> list:
        return [batch_of_rows(rows, own[start : start + size]) for start in range(0, share, size)]

    for step in range(STEPS):
        rows = random_rows(config.model.vocab_size, ROWS, SEQ_LEN, seed=step)
        num_tokens = int((rows.labels != -100).sum())
        output = engine.train_step(micro_batches(rows), step=step, num_tokens=num_tokens, learning_rate=LEARNING_RATE)
        curve.append((output.loss, output.grad_norm))
    rows = random_rows(config.model.vocab_size, ROWS, SEQ_LEN, seed=STEPS)
    (evaluated,) = mesh.control_sum([engine.evaluate(micro_batches(rows))], dtype=torch.float64)
    check_every_element_is_owned_once(engine, config.model, mesh)
    return [*curve, (evaluated / 100, 1.0)]


def check_every_element_is_owned_once(engine, config: ModelConfig, mesh: Mesh) -> None:
    """The owned pieces of all ranks hold as many elements as the model has, three kinds of state each."""
    pieces = list(engine.state_pieces())
    assert all(piece.tensor.numel() == piece.box.numel for piece in pieces)
    (owned,) = mesh.control_sum([sum(piece.box.numel for piece in pieces if piece.is_owner)])
    parameters = sum(parameter.numel() for parameter in build_model(config, SEED).parameters())
    assert owned == 3 * parameters, f"{owned} owned elements, 3 x {parameters} in the model"


def main() -> None:
    info = read_rank_info(dict(os.environ))
    device = join_ranks(info, timeout_s=100)
    torch.set_num_threads(1)
    share_small_parameters()
    plain: dict[tuple, Curve] = {}
    for case in (CASES[name] for name in json.loads(sys.argv[1])):
        config = case_config(case)
        key = case.model, config.data.document_mask
        if key not in plain:
            plain[key] = plain_run(config.model, config.data.document_mask)
        layout = layout_of(config, derive(config, case.ranks, case.name))
        curve = laid_out_run(case, lay_out_mesh(layout, info.rank, device))
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
