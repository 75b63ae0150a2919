"""Runs one rank of the flat optimizer's test: gradients are given, so that every axis can be tested without a model.

Arguments: a JSON list of cases {pp, tp, cp, ep, zero_stage, offload, bad: [rank, parameter] or nothing}. Rank 0 prints
one JSON result a case.

Each rank writes its share of known whole gradients where backward passes would, and the update must be plain AdamW's
on the whole ones. The first and the last pipeline rank both hold `embed`; the last holds no undecayed parameter and no
expert, so that some of its groups are empty. ep cuts the experts, which hold odd numbers, so that parts are padded.
"""

import io
import json
import math
import os
import sys
from contextlib import redirect_stdout

import torch
import torch.distributed as dist
from torch import nn

from megascale.engine.build import connect_deepspeed
from megascale.engine.flat_zero import FlatZeroOptimizer
from megascale.engine.fragments import linked_pieces
from megascale.engine.micro_batches import gather_faults
from megascale.engine.replicas import divide_groups, norm_group
from megascale.parallel.axis import Axis
from megascale.parallel.boxes import Box
from megascale.parallel.layout import Layout
from megascale.parallel.mesh import Mesh, close_mesh, join_ranks, lay_out_mesh, read_rank_info
from megascale.parallel.placement import Placement

STEPS, CLIP, BAD_STEP = 6, 0.5, 2
SHAPES = {"embed": (12, 3), "first.up": (8, 5), "first.norm": (7,), "first.bias": (3,), "last.down": (5, 8),
          "first.experts": (4, 6, 5)}
TP_DIM = {"embed": 0, "first.up": 0, "last.down": 1, "first.experts": 1}
EP_DIM = {"first.experts": 0}
PARTIAL_OVER_TP = {"first.norm"}


def whole_values(step: int) -> dict[str, torch.Tensor]:
    """The whole gradients of a step; the values at the start for step -1."""
    generator = torch.Generator().manual_seed(step + 1)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def adamw(parameters: dict[str, nn.Parameter]) -> torch.optim.AdamW:
    decayed = [parameter for name, parameter in parameters.items() if len(SHAPES[name]) > 1]
    kept = [parameter for name, parameter in parameters.items() if len(SHAPES[name]) == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, fused=True)


def plain_run(skipped: int | None) -> tuple[list[float], dict[str, torch.Tensor]]:
    parameters = {name: nn.Parameter(value) for name, value in whole_values(-1).items()}
    optimizer, norms = adamw(parameters), []
    for step in range(STEPS):
        for name, gradient in whole_values(step).items():
            parameters[name].grad = gradient
        norms.append(nn.utils.clip_grad_norm_(parameters.values(), CLIP).item())
        if step != skipped:
            optimizer.step()
    return norms, {name: parameter.detach() for name, parameter in parameters.items()}


def own_names(mesh: Mesh) -> list[str]:
    """The last rank lists its copy of `embed` last, as a model lists its head."""
    first = ["embed", "first.up", "first.experts", "first.norm", "first.bias"] if mesh.pp.rank == 0 else []
    last = ["last.down"] if mesh.pp.rank == mesh.pp.size - 1 else []
    return first + last + (["embed"] if last and not first else [])


def place(name: str, mesh: Mesh) -> Placement:
    starts, stops = [0] * len(SHAPES[name]), list(SHAPES[name])
    for axis, dims in ((mesh.tp, TP_DIM), (mesh.ep, EP_DIM)):
        if name in dims:
            size = SHAPES[name][dims[name]] // axis.size
            starts[dims[name]], stops[dims[name]] = axis.rank * size, (axis.rank + 1) * size
    partial_over = mesh.ends if name == "embed" else mesh.tp if name in PARTIAL_OVER_TP else Axis()
    is_copy = name == "embed" and mesh.ends.rank > 0
    is_counted = not is_copy and (name in TP_DIM or mesh.tp.rank == 0)
    is_expert = name in EP_DIM and mesh.ep.size > 1
    return Placement(name, SHAPES[name], Box(tuple(starts), tuple(stops)), is_counted, partial_over, is_expert)


def own_share(gradient: torch.Tensor, placement: Placement, mesh: Mesh) -> torch.Tensor:
    """What this rank's backward passes would leave: shares that differ and add up over replicas and partial axes."""
    group, axis = mesh.expert_group if placement.is_expert else mesh.zero_group, placement.partial_over
    weight = 1.0
    for size, rank in ((dist.get_world_size(group), dist.get_rank(group)), (axis.size, axis.rank)):
        weight *= 2 * (rank + 1) / (size * (size + 1))
    return gradient[placement.box.slices] * weight


def run_case(case: dict, mesh: Mesh) -> dict:
    start, bad = whole_values(-1), case.get("bad")
    placed = {name: place(name, mesh) for name in own_names(mesh)}
    parameters = {
        name: nn.Parameter(start[name][placement.box.slices].to(mesh.device)) for name, placement in placed.items()
    }
    placements = {parameters[name]: placement for name, placement in placed.items()}
    base, stage = adamw(parameters), case["zero_stage"]
    with redirect_stdout(io.StringIO()):
        optimizer = FlatZeroOptimizer(
            base, placements, divide_groups(base, placements, mesh, stage), norm_group(mesh, stage), CLIP,
            case.get("offload", False),
        )
    norms, skipped, faults = [], [], ()
    for step in range(STEPS):
        for name, gradient in whole_values(step).items():
            if name in parameters:
                share = own_share(gradient, placed[name], mesh).to(mesh.device)
                if bad == [mesh.rank, name] and step == BAD_STEP:
                    share.view(-1)[-1] = math.inf
                optimizer.add_gradient(parameters[name], share)
        optimizer.reduce_gradients(unscale=1.0)
        optimizer.step()
        norms.append(float(optimizer._global_grad_norm))
        if optimizer.overflow:
            skipped.append(step)
            faults = gather_faults(mesh, True, optimizer.first_nonfinite())
    plain_norms, plain_values = plain_run(BAD_STEP if bad else None)
    pieces = list(linked_pieces(placements, [replicas.share for replicas in optimizer.replicas]))
    gap = max((
        (piece.tensor.cpu() - plain_values[piece.key.split("/")[1]][piece.box.slices].flatten()).abs().max().item()
        for piece in pieces if piece.key.startswith("master/")
    ), default=0.0)
    parameter_gap = max(
        (parameters[name].cpu() - plain_values[name][placement.box.slices]).abs().max().item()
        for name, placement in placed.items()
    )
    (owned,) = mesh.control_sum([sum(piece.box.numel for piece in pieces if piece.is_owner)])
    gaps = [value / 1e9 for value in mesh.control_gather(int(max(gap, parameter_gap) * 1e9))]
    pairs = [(a, b) for step, (a, b) in enumerate(zip(plain_norms, norms, strict=True)) if step not in skipped]
    return case | {
        "norm_gap": max(abs(a - b) / a for a, b in pairs),
        "value_gap": max(gaps),
        "owned": owned,
        "elements": 3 * sum(math.prod(shape) for shape in SHAPES.values()),
        "skipped": skipped,
        "same_skips": len(set(mesh.control_gather(len(skipped)))) == 1,
        "faults": faults,
    }


def main() -> None:
    info = read_rank_info(dict(os.environ))
    device = join_ranks(info, timeout_s=60)
    torch.set_num_threads(1)
    for case in json.loads(sys.argv[1]):
        sizes = {axis: case.get(axis, 1) for axis in ("pp", "cp", "tp")}
        layout = Layout(dp=info.world_size // math.prod(sizes.values()), ep=case.get("ep", 1), **sizes)
        mesh = lay_out_mesh(layout, info.rank, device)
        connect_deepspeed(mesh)
        result = run_case(case, mesh)
        if mesh.rank == 0:
            print(json.dumps(result), flush=True)
    mesh.barrier()
    close_mesh()


if __name__ == "__main__":
    main()
