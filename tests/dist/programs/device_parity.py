"""Runs one rank of low-precision parity on this machine's devices: each case against a plain fp32 loop on the CPU.

Arguments: a JSON list of cases, each a dict of config sections beside the defaults here, all with as many ranks as this
run has. Rank 0 prints one JSON result a case: the case and {loss_gap, norm_gap, eval_gap, min_norm, device}.

The model is large enough for what small ones leave out: FlexAttention (heads of 32, tiles of 128) and fp8 (sizes that
16 divides). The plain loop attends by a dense mask, so that on a GPU no kernel is the same.
"""

import json
import os
import sys

import torch
import torch.nn.functional as F

from megascale.config.derive import derive
from megascale.config.load import parse_config
from megascale.config.schema import RunConfig
from megascale.model.context import build_context
from megascale.model.dropout import derive_row_keys
from megascale.model.transformer import Transformer, build_model
from megascale.parallel.mesh import Mesh, close_mesh, join_ranks, lay_out_mesh, read_rank_info
from megascale.train.build import build_run_engine, layout_of
from tests.support.tiny import batch_of_rows, gap, random_rows, share_small_parameters

ROWS, SEQ_LEN, STEPS, CLIP_NORM, LEARNING_RATE, SEED = 4, 256, 8, 0.5, 1e-3, 1
MODEL = {"num_layers": 2, "d_model": 128, "num_heads": 4, "vocab_size": 61, "max_seq_len": SEQ_LEN}
FAMILIES = {"llama": {"num_kv_heads": 2, "d_ff": 256}, "gpt2": {}}

Curve = list[tuple[float, float]]
"""(loss, gradient norm) of each step; the last entry is (evaluation loss sum per token, 1)."""


def case_config(case: dict) -> RunConfig:
    """The run config of a case."""
    family = case.get("model", {}).get("family", "llama")
    never = {"interval_steps": 1000}
    return parse_config({
        "run": {"name": "parity", "folder": "unused", "seed": SEED},
        "model": {"family": family} | MODEL | FAMILIES[family] | case.get("model", {}),
        "data": {"folder": "unused"} | case.get("data", {}),
        "train": {"seq_len": SEQ_LEN, "micro_batch_size": 2, "global_batch_tokens": ROWS * SEQ_LEN, "max_steps": STEPS}
        | case.get("train", {}),
        "optimizer": {"learning_rate": LEARNING_RATE, "clip_norm": CLIP_NORM, "schedule": "constant"},
        "precision": {"dtype": "bf16", "initial_loss_scale_log2": 10} | case.get("precision", {}),
        "parallel": case.get("parallel", {}),
        "evaluate": never,
        "checkpoint": never,
    }, source=str(case))


def plain_loss(model: Transformer, rows, has_documents: bool, step: int) -> torch.Tensor:
    """Sum of the loss over all rows: logits, then torch's own cross-entropy."""
    batch = batch_of_rows(rows, range(ROWS))
    keys_B = derive_row_keys(batch.row_numbers_B, SEED, step) if model.config.dropout else None
    documents_BT = batch.documents_BT if has_documents else None
    context = build_context(
        model.config, SEQ_LEN, torch.device("cpu"), documents_BT=documents_BT, row_keys_B=keys_B
    )
    logits_NV = model(batch.tokens_BT, context).flatten(0, 1)
    return F.cross_entropy(logits_NV, batch.labels_BT.flatten(), ignore_index=-100, reduction="sum")


def rows_of(config: RunConfig, step: int):
    """The rows of a step and how many labels they have."""
    rows = random_rows(config.model.vocab_size, ROWS, SEQ_LEN, seed=step)
    return rows, int((rows.labels != -100).sum())


def plain_run(config: RunConfig) -> Curve:
    """A plain single-process fp32 loop on the CPU."""
    model, curve, has_documents = build_model(config.model, SEED), [], config.data.document_mask
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8)
    for step in range(STEPS):
        rows, num_tokens = rows_of(config, step)
        loss = plain_loss(model, rows, has_documents, step) / num_tokens
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        curve.append((loss.item(), norm.item()))
    rows, num_tokens = rows_of(config, STEPS)
    with torch.no_grad():
        return [*curve, (plain_loss(model.eval(), rows, has_documents, 0).item() / num_tokens, 1.0)]


def device_run(config: RunConfig, mesh: Mesh) -> Curve:
    """The same through the run's own engine."""
    derived = derive(config, mesh.world_size)
    engine = build_run_engine(config, mesh)
    share, curve, size = ROWS // derived.dp, [], config.train.micro_batch_size
    own = range(mesh.dp_rank * share, (mesh.dp_rank + 1) * share)

    def micro_batches(rows) -> list:
        return [batch_of_rows(rows, own[start : start + size]) for start in range(0, share, size)]

    for step in range(STEPS):
        rows, num_tokens = rows_of(config, step)
        output = engine.train_step(micro_batches(rows), step=step, num_tokens=num_tokens, learning_rate=LEARNING_RATE)
        assert not output.is_skipped, output
        curve.append((output.loss, output.grad_norm))
    rows, num_tokens = rows_of(config, STEPS)
    (evaluated,) = mesh.control_sum([engine.evaluate(micro_batches(rows))], dtype=torch.float64)
    return [*curve, (evaluated / num_tokens, 1.0)]


def main() -> None:
    info = read_rank_info(dict(os.environ))
    device = join_ranks(info, timeout_s=300)
    torch.set_num_threads(1)
    share_small_parameters()
    plain: dict[str, Curve] = {}
    for case in json.loads(sys.argv[1]):
        config = case_config(case)
        key = f"{config.model} {config.data.document_mask}"
        if key not in plain:
            plain[key] = plain_run(config)
        layout = layout_of(config, derive(config, info.world_size))
        curve = device_run(config, lay_out_mesh(layout, info.rank, device))
        torch.compiler.reset()
        gaps = [[gap(a[i], b[i]) for a, b in zip(plain[key], curve, strict=True)] for i in (0, 1)]
        if info.rank == 0:
            print(json.dumps({
                "case": case, "loss_gap": max(gaps[0][:-1]), "norm_gap": max(gaps[1]), "eval_gap": gaps[0][-1],
                "min_norm": min(norm for _, norm in plain[key][:-1]), "device": device.type,
            }), flush=True)
    torch.distributed.barrier()
    close_mesh()


if __name__ == "__main__":
    main()
