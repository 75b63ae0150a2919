"""Runs one rank of the ZeRO-under-tp test: a two-layer net cut by hand, against the same net in one process.

Arguments: a JSON list of cases {tp, cp, zero_stage, dtype, offload, poison: [rank, parameter] or nothing}. Rank 0
prints one JSON result a case.

The net has each kind of parameter: `norm` works on a tp-th of the positions (gradient partial over tp), `up` and `down`
are cut, `bias` is repeated on every tp rank with whole gradients. Shapes: N positions, D width, F hidden, f = F / tp.
"""

import json
import math
import os
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from megascale.config.training import PrecisionConfig
from megascale.engine.base import EngineSettings
from megascale.engine.build import build_engine
from megascale.parallel.axis import Axis
from megascale.parallel.boxes import Box
from megascale.parallel.collectives import gather, reduce_from
from megascale.parallel.layout import Layout
from megascale.parallel.mesh import Mesh, close_mesh, join_ranks, lay_out_mesh, read_rank_info
from megascale.parallel.placement import Placement
from tests.support.tiny import share_small_parameters

STEPS, POSITIONS, WIDTH, HIDDEN, CLIP, LEARNING_RATE, MICRO_BATCHES = 10, 8, 6, 10, 0.5, 3e-3, 2
SHAPES = {"norm": (WIDTH,), "up": (HIDDEN, WIDTH), "down": (WIDTH, HIDDEN), "bias": (WIDTH,)}
TP_DIM = {"up": 0, "down": 1}
POISONED_STEP = 3


@dataclass
class Part:
    """A micro-batch: inputs and targets of some positions."""

    inputs_ND: torch.Tensor
    targets_ND: torch.Tensor

    def to(self, device) -> "Part":
        return self


class Net(nn.Module):
    """This rank's part of the net."""

    def __init__(self, tp: Axis, parameters: dict[str, torch.Tensor]):
        super().__init__()
        self.tp = tp
        self.norm, self.up, self.down, self.bias = (nn.Parameter(parameters[name].clone()) for name in SHAPES)

    def forward(self, inputs_ND: torch.Tensor, targets_ND: torch.Tensor) -> torch.Tensor:
        inputs_ND = inputs_ND.to(self.norm.dtype)
        share_nD = inputs_ND.chunk(self.tp.size)[self.tp.rank] * self.norm
        hidden_Nf = torch.tanh(gather(share_nD, self.tp, 0) @ self.up.T)
        outputs_ND = reduce_from(hidden_Nf @ self.down.T, self.tp) + self.bias
        return (outputs_ND.float() - targets_ND).square().sum()


def start_values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.5 + torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}


def rows_of(step: int, replica: int, micro_batch: int) -> Part:
    generator = torch.Generator().manual_seed(10_000 * step + 100 * replica + micro_batch)
    return Part(*(torch.randn(POSITIONS, WIDTH, generator=generator) for _ in range(2)))


def optimizer_of(net: Net) -> torch.optim.AdamW:
    decayed, kept = [net.up, net.down], [net.norm, net.bias]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, fused=True)


def plain_run(num_replicas: int) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    net, curve = Net(Axis(), start_values()), []
    optimizer, num_tokens = optimizer_of(net), num_replicas * MICRO_BATCHES * POSITIONS
    for step in range(STEPS):
        parts = [rows_of(step, replica, i) for replica in range(num_replicas) for i in range(MICRO_BATCHES)]
        loss = sum(net(part.inputs_ND, part.targets_ND) for part in parts) / num_tokens
        loss.backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        curve.append((loss.item(), norm.item()))
    return curve, {name: parameter.detach() for name, parameter in net.named_parameters()}


def placed_net(mesh: Mesh) -> tuple[Net, dict[nn.Parameter, Placement]]:
    boxes = {}
    for name, shape in SHAPES.items():
        starts, stops = [0] * len(shape), list(shape)
        if name in TP_DIM:
            size = shape[TP_DIM[name]] // mesh.tp.size
            starts[TP_DIM[name]], stops[TP_DIM[name]] = mesh.tp.rank * size, (mesh.tp.rank + 1) * size
        boxes[name] = Box(tuple(starts), tuple(stops))
    net = Net(mesh.tp, {name: value[boxes[name].slices] for name, value in start_values().items()})
    return net, {
        parameter: Placement(
            name, SHAPES[name], boxes[name], is_counted=name in TP_DIM or mesh.tp.rank == 0,
            partial_over=mesh.tp if name == "norm" else Axis(),
        )
        for name, parameter in net.named_parameters()
    }


def run_case(case: dict, mesh: Mesh) -> dict:
    net, placements = placed_net(mesh)
    position, poison = {"step": -1}, case.get("poison")
    if poison and poison[0] == mesh.rank:
        net.get_parameter(poison[1]).register_hook(
            lambda gradient: gradient * math.inf if position["step"] == POISONED_STEP else None
        )
    engine = build_engine(
        net, optimizer_of(net), lambda part, step, factor: (part.inputs_ND, part.targets_ND), mesh,
        PrecisionConfig(dtype=case["dtype"], initial_loss_scale_log2=8),
        EngineSettings(case["zero_stage"], CLIP, 1, offload_optimizer=case.get("offload", "none")),
        placements,
    )
    replica, num_replicas = dist.get_rank(mesh.zero_group), dist.get_world_size(mesh.zero_group)
    curve, skipped, faults = [], [], ()
    for step in range(STEPS):
        position["step"] = step
        parts = [rows_of(step, replica, i) for i in range(MICRO_BATCHES)]
        num_tokens = num_replicas * MICRO_BATCHES * POSITIONS
        output = engine.train_step(parts, step=step, num_tokens=num_tokens, learning_rate=LEARNING_RATE)
        curve.append((output.loss, output.grad_norm))
        if output.is_skipped:
            skipped.append([step, output.is_overflow])
            faults = output.faults
    (evaluated,) = mesh.control_sum([engine.evaluate(parts)], dtype=torch.float64)
    plain, values = plain_run(num_replicas)
    plain_net = Net(Axis(), values)
    expected = sum(
        plain_net(part.inputs_ND, part.targets_ND).item()
        for part in (rows_of(STEPS - 1, replica, i) for replica in range(num_replicas) for i in range(MICRO_BATCHES))
    )
    owned, piece_gap = 0, 0.0
    for piece in engine.state_pieces():
        kind, name = piece.key.split("/")
        owned += piece.box.numel if piece.is_owner else 0
        if kind == "master":
            whole = values[name][piece.box.slices].flatten()
            piece_gap = max(piece_gap, (piece.tensor.cpu() - whole).abs().max().item())
    (owned,) = mesh.control_sum([owned])
    piece_gap = max(value / 1e9 for value in mesh.control_gather(int(piece_gap * 1e9)))
    return case | {
        "loss_gap": max(abs(a[0] - b[0]) / max(1, a[0]) for a, b in zip(plain, curve, strict=True)),
        "norm_gap": max(abs(a[1] - b[1]) / max(1, a[1]) for a, b in zip(plain, curve, strict=True)),
        "min_norm": min(norm for _, norm in plain),
        "value_gap": piece_gap,
        "evaluate_gap": abs(evaluated - expected) / expected,
        "owned": owned,
        "skipped": skipped,
        "same_skips": len(set(mesh.control_gather(len(skipped)))) == 1,
        "faults": faults,
        "scale": engine.scalars().get("loss_scaler.cur_scale"),
    }


def main() -> None:
    share_small_parameters()
    info = read_rank_info(dict(os.environ))
    device = join_ranks(info, timeout_s=60)
    torch.set_num_threads(1)
    for case in json.loads(sys.argv[1]):
        tp, cp = case.get("tp", 1), case.get("cp", 1)
        mesh = lay_out_mesh(Layout(dp=info.world_size // (tp * cp), cp=cp, tp=tp), info.rank, device)
        result = run_case(case, mesh)
        if mesh.rank == 0:
            print(json.dumps(result), flush=True)
    mesh.barrier()
    close_mesh()


if __name__ == "__main__":
    main()
