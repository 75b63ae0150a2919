"""Runs one rank of the parity of vision transformers: each layout against a plain loop in fp64 over the same images.

Arguments: a JSON list of cases {name, model, parallel, train, resume_in}, all of as many ranks as run. Rank 0 prints
one JSON result a case: {name, loss_gap, norm_gap, eval_gap}. The plain loop takes the model's logits and
predictions, and its losses are its own. With `resume_in` a case ends in another layout, from its state after half the
steps.
"""

import json
import os
import sys

import torch
import torch.nn.functional as F

from megascale.config.derive import derive
from megascale.config.load import parse_config
from megascale.config.schema import RunConfig
from megascale.data.batch import Batch
from megascale.model.axes import ONE_RANK
from megascale.model.transformer import build_model
from megascale.parallel.mesh import Mesh, close_mesh, join_ranks, lay_out_mesh, read_rank_info
from megascale.train.build import build_run_engine, layout_of
from megascale.train.image_objective import image_objective, target_patches
from tests.support.layouts import ADAM_EPS, CLIP_NORM, LEARNING_RATE, SEED
from tests.support.tiny import gap, share_small_parameters

ROWS, STEPS, CLASSES = 8, 6, 7
CLASS_TOKEN = {"image_size": 12, "patch_size": 4}
MEAN = {"image_size": 12, "patch_size": 3, "pooling": "mean"}
MAE = CLASS_TOKEN | {"mae_decoder_layers": 2, "mae_decoder_width": 16, "mae_decoder_heads": 2}
VISIONS = {"cls": CLASS_TOKEN, "dropout": CLASS_TOKEN, "mean": MEAN, "mae": MAE}


def case_config(case: dict) -> RunConfig:
    vision = VISIONS[case["model"]]
    num_patches = (vision["image_size"] // vision["patch_size"]) ** 2
    objective = {"kind": "mae", "mask_fraction": 0.6} if case["model"] == "mae" else {}
    return parse_config({
        "run": {"name": "vit", "folder": "unused", "seed": SEED},
        "model": {"family": "vit", "num_layers": 2, "d_model": 32, "num_heads": 4, "vocab_size": CLASSES,
                  "vocab_multiple": CLASSES + 1,  # so that each of two tp ranks has classes
                  "max_seq_len": num_patches, "vision": vision, "dropout": 0.2 * (case["model"] == "dropout")},
        "data": {"folder": "unused", "packing": "none", "objective": objective},
        "train": {"seq_len": num_patches, "micro_batch_size": 2, "global_batch_tokens": ROWS * num_patches,
                  "max_steps": STEPS} | case.get("train", {}),
        "optimizer": {"learning_rate": LEARNING_RATE, "clip_norm": CLIP_NORM, "schedule": "constant", "eps": ADAM_EPS},
        "precision": {"dtype": "fp32"},
        "parallel": {"zero_stage": 1} | case["parallel"],
        "evaluate": {"interval_steps": 1000},
        "checkpoint": {"interval_steps": 1000},
    }, case["name"])


def rows_of(config: RunConfig, step: int, numbers: range) -> Batch:
    """Some of a step's rows; the last one is a row that couldn't be read, without label."""
    vision, generator = config.model.vision, torch.Generator().manual_seed(100 + step)
    images_BCHW = torch.randn(ROWS, 3, vision.image_size, vision.image_size, generator=generator)
    if vision.is_mae:
        noise_BT = torch.rand(ROWS, vision.num_patches, generator=generator)
        labels_BT = torch.where(noise_BT.argsort(1).argsort(1) >= int(vision.num_patches * 0.4), 0, -100)
    else:
        labels_BT = torch.randint(0, CLASSES, (ROWS, 1), generator=generator)
    labels_BT[-1] = -100
    chosen = torch.tensor(list(numbers))
    nothing_BT = torch.zeros_like(labels_BT[chosen])
    return Batch(nothing_BT, labels_BT[chosen], nothing_BT.int(), chosen, images_BCHW=images_BCHW[chosen])


def plain_loss(model, config: RunConfig, step: int, rows_step: int) -> tuple[torch.Tensor, int]:
    """Sum of the losses of all rows of a step in one forward pass, and the number of labels."""
    batch = rows_of(config, rows_step, range(ROWS))
    inputs, context, labels_BT = image_objective(config, ONE_RANK)(batch, step, None)
    found, num_labels = model(inputs.double(), context), int((labels_BT >= 0).sum())
    if not config.model.vision.is_mae:
        return F.cross_entropy(found[:, 0], labels_BT[:, 0], ignore_index=-100, reduction="sum"), num_labels
    wanted_BTP = target_patches(batch.images_BCHW, config.model.vision.patch_size).double()
    centred_BTP = wanted_BTP - wanted_BTP.mean(-1, keepdim=True)
    wanted_BTP = centred_BTP / (wanted_BTP.var(-1, keepdim=True) + 1e-6).sqrt()
    return (found - wanted_BTP)[labels_BT >= 0].square().mean(-1).sum(), num_labels


def plain_run(config: RunConfig) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step, then the evaluation's sum of losses / 100."""
    model, curve = build_model(config.model, SEED).double(), []
    decayed = ("patches.weight", "positions.weight", "qkv.weight", "output.weight", "up.weight", "head.weight",
               "embed.weight", "predict.weight")
    groups = [
        {"params": [p for n, p in model.named_parameters() if n.endswith(decayed)], "weight_decay": 0.1},
        {"params": [p for n, p in model.named_parameters() if not n.endswith(decayed)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=ADAM_EPS)
    for step in range(STEPS):
        loss_sum, num_labels = plain_loss(model, config, step, step)
        loss = loss_sum / num_labels
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        curve.append((loss.item(), norm.item()))
    with torch.no_grad():
        return [*curve, (plain_loss(model.eval(), config, 0, STEPS)[0].item() / 100, 1.0)]


def laid_out_run(case: dict, info, device) -> list[tuple[float, float]]:
    """The same through the run's own engine; the second half in the layout `resume_in`, where there is one."""
    curve, kept = [], None
    halves = [(case, range(STEPS))]
    if "resume_in" in case:
        other = case | {"parallel": case["resume_in"]}
        halves = [(case, range(STEPS // 2)), (other, range(STEPS // 2, STEPS))]
    for half, steps in halves:
        config = case_config(half)
        derived = derive(config, info.world_size, case["name"])
        mesh = lay_out_mesh(layout_of(config, derived), info.rank, device)
        engine = build_run_engine(config, mesh)
        if kept is not None:
            put_state(engine, *kept)
        share, size = ROWS // derived.dp, config.train.micro_batch_size
        own = range(mesh.dp_rank * share, (mesh.dp_rank + 1) * share)

        def batches(step: int, config=config, own=own, share=share, size=size) -> list[Batch]:
            return [rows_of(config, step, own[start : start + size]) for start in range(0, share, size)]

        for step in steps:
            num_labels = int((rows_of(config, step, range(ROWS)).labels_BT >= 0).sum())
            output = engine.train_step(batches(step), step=step, num_tokens=num_labels, learning_rate=LEARNING_RATE)
            curve.append((output.loss, output.grad_norm))
        kept = take_state(engine, config, mesh), engine.scalars()
    (evaluated,) = mesh.control_sum([engine.evaluate(batches(STEPS))], dtype=torch.float64)
    return [*curve, (evaluated / 100, 1.0)]


def take_state(engine, config: RunConfig, mesh: Mesh) -> dict[str, torch.Tensor]:
    """Every tensor of the training state, whole, from the pieces that ranks own, each element of which one rank has."""
    shapes = {name: parameter.shape for name, parameter in build_model(config.model, SEED).named_parameters()}
    whole = {f"{kind}/{name}": torch.zeros(shapes[name])
             for name in sorted(shapes) for kind in ("exp_avg", "exp_avg_sq", "master")}
    for piece in engine.state_pieces():
        if piece.is_owner:
            whole[piece.key][piece.box.slices] += piece.tensor.view([
                stop - start for start, stop in zip(piece.box.starts, piece.box.stops, strict=True)
            ]).cpu()
    for tensor in whole.values():
        torch.distributed.all_reduce(tensor)
    return whole


def put_state(engine, whole: dict[str, torch.Tensor], scalars: dict[str, float]) -> None:
    for piece in engine.state_pieces():
        piece.tensor.copy_(whole[piece.key][piece.box.slices].flatten())
    engine.restore_scalars(scalars)


def main() -> None:
    info = read_rank_info(dict(os.environ))
    device = join_ranks(info, timeout_s=100)
    torch.set_num_threads(1)
    share_small_parameters()
    plain = {}
    for case in json.loads(sys.argv[1]):
        if case["model"] not in plain:
            plain[case["model"]] = plain_run(case_config(case))
        expected, found = plain[case["model"]], laid_out_run(case, info, device)
        gaps = [[gap(a[i], b[i]) for a, b in zip(expected, found, strict=True)] for i in (0, 1)]
        if info.rank == 0:
            print(json.dumps({"name": case["name"], "loss_gap": max(gaps[0][:-1]), "norm_gap": max(gaps[1]),
                              "eval_gap": gaps[0][-1]}), flush=True)
    torch.distributed.barrier()
    close_mesh()


if __name__ == "__main__":
    main()
