"""Runs one rank of the ZeRO parity test: each case against a plain PyTorch loop over the same batches.

Arguments: a JSON list of cases {zero_stage, dtype, micro_batch_size, recompute}. Rank 0 prints one JSON result a case.
"""

import json
import os
import sys
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from megascale.config.model import ModelConfig
from megascale.config.training import PrecisionConfig
from megascale.engine.base import EngineSettings
from megascale.engine.build import build_engine
from megascale.model.recompute import set_recompute
from megascale.model.transformer import build_model
from megascale.parallel.layout import Layout
from megascale.parallel.mesh import build_mesh, close_mesh, read_rank_info
from tests.support.tiny import TINY_LLAMA, batch_of_rows, gap, random_rows, share_small_parameters

STEPS, ROWS, SEQ_LEN, CLIP, LEARNING_RATE = 20, 8, 16, 0.5, 3e-3


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8)


def objective(batch, step, loss_factor):
    return batch.tokens_BT, None, batch.labels_BT


def plain_run(config: ModelConfig) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step of a plain single-process fp32 loop."""
    model = build_model(config, seed=1)
    optimizer, curve = adamw(model), []
    for step in range(STEPS):
        batch = batch_of_rows(random_rows(config.vocab_size, ROWS, SEQ_LEN, seed=step), range(ROWS))
        logits_NV = model(batch.tokens_BT).flatten(0, 1)
        nll = F.cross_entropy(logits_NV, batch.labels_BT.flatten(), ignore_index=-100, reduction="sum")
        count = (batch.labels_BT != -100).sum()
        (nll / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(((nll / count).item(), norm.item()))
    return curve


def sharded_run(config: ModelConfig, case: SimpleNamespace, mesh) -> list[tuple[float, float]]:
    """The same through the engine: rows split over replicas and micro-batches."""
    model = build_model(config, seed=1)
    precision = PrecisionConfig(dtype=case.dtype, initial_loss_scale_log2=10)
    set_recompute(model, getattr(case, "recompute", "none"))
    settings = EngineSettings(case.zero_stage, CLIP, case.micro_batch_size)
    engine = build_engine(model, adamw(model), objective, mesh, precision, settings, model.placements())
    curve, share = [], ROWS // mesh.layout.dp
    own = range(mesh.dp_rank * share, (mesh.dp_rank + 1) * share)
    for step in range(STEPS):
        rows = random_rows(config.vocab_size, ROWS, SEQ_LEN, seed=step)
        micro_batches = [
            batch_of_rows(rows, own[start : start + case.micro_batch_size])
            for start in range(0, share, case.micro_batch_size)
        ]
        num_tokens = int((rows.labels != -100).sum())
        output = engine.train_step(micro_batches, step=step, num_tokens=num_tokens, learning_rate=LEARNING_RATE)
        curve.append((output.loss, output.grad_norm))
    check_every_element_is_owned_once(engine, mesh)
    return curve


def check_every_element_is_owned_once(engine, mesh) -> None:
    """The owned pieces of all ranks hold as many elements as the model has, three kinds of state each."""
    pieces = list(engine.state_pieces())
    assert all(piece.tensor.numel() == piece.box.numel for piece in pieces)
    (owned,) = mesh.control_sum([sum(piece.box.numel for piece in pieces if piece.is_owner)])
    parameters = sum(parameter.numel() for parameter in build_model(TINY_LLAMA, seed=1).parameters())
    assert owned == 3 * parameters, f"{owned} owned elements, 3 x {parameters} in the model"


def main() -> None:
    share_small_parameters()
    cases = [SimpleNamespace(**case) for case in json.loads(sys.argv[1])]
    info = read_rank_info(dict(os.environ))
    mesh = build_mesh(Layout(dp=info.world_size), info, timeout_s=60)
    torch.set_num_threads(1)
    plain = plain_run(TINY_LLAMA)
    for case in cases:
        curve = sharded_run(TINY_LLAMA, case, mesh)
        loss_gap, norm_gap = (max(gap(a[i], b[i]) for a, b in zip(plain, curve, strict=True)) for i in (0, 1))
        if mesh.rank == 0:
            print(json.dumps({**vars(case), "dp": mesh.layout.dp, "loss_gap": loss_gap, "norm_gap": norm_gap,
                              "min_norm": min(norm for _, norm in plain)}), flush=True)
    mesh.barrier()
    close_mesh()


if __name__ == "__main__":
    main()
