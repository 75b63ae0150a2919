"""One rank of the pipeline test: a toy model through each schedule against the same model in one piece.

Argument: a JSON list of cases {schedule, stages_per_rank, num_micro_batches, stage_blocks}. Each rank prints one JSON
result a case.

Shapes: B rows, T positions, D features, V vocabulary.
"""

import copy
import json
import os
import sys
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from megascale.engine.pipeline import LeanStage, PipelineRunner, build_pipeline
from megascale.parallel.layout import Layout
from megascale.parallel.mesh import Mesh, build_mesh, close_mesh, read_rank_info
from megascale.parallel.stages import plan_stages, stages_of_rank

B, T, D, V, NUM_BLOCKS = 2, 3, 8, 11, 10
SCALE = 0.125


class DeferrableProduct(torch.autograd.Function):
    """x W^T, whose weight gradient waits in a queue where there is one."""

    @staticmethod
    def forward(ctx, inputs, weight, deferred):
        ctx.save_for_backward(inputs, weight)
        ctx.parameter, ctx.deferred = weight, deferred
        return inputs @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        inputs, weight = ctx.saved_tensors

        def compute() -> torch.Tensor:
            return grad.flatten(0, -2).t() @ inputs.flatten(0, -2)

        if ctx.deferred is None:
            return grad @ weight, compute(), None
        ctx.deferred.add(ctx.parameter, compute)
        return grad @ weight, None, None


class Linear(nn.Module):
    """Has a bias whose gradient comes at once, beside the weight whose gradient may wait."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.deferred = None

    def forward(self, inputs):
        return DeferrableProduct.apply(inputs, self.weight, self.deferred) + self.bias


class Embedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(V, D)

    def forward(self, inputs, context, labels=None, last_B=None):
        return self.table(inputs)


class Block(nn.Module):
    """Adds a part that depends on the context, so that a context of another micro-batch or step shows."""

    def __init__(self):
        super().__init__()
        self.up = Linear(D, 2 * D)
        self.down = Linear(2 * D, D)

    def forward(self, hidden, context, labels=None, last_B=None):
        return hidden + self.down(torch.tanh(self.up(hidden))) * context["factor"]


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = Linear(D, V)

    def forward(self, hidden, context, labels=None, last_B=None):
        if labels is None:
            return self.linear(hidden)[torch.arange(len(last_B)), last_B]
        return F.cross_entropy(self.linear(hidden).flatten(0, 1), labels.flatten(), reduction="sum") + context["extra"]


class Stack(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, inputs, context, labels=None, last_B=None):
        for layer in self.layers:
            inputs = layer(inputs, context, labels, last_B)
        return inputs


class ToyBatch:
    """Tokens and labels drawn by number; remembers how often it was prepared."""

    def __init__(self, number: int, extra: float = 0.0):
        generator = torch.Generator().manual_seed(number)
        self.tokens_BT = torch.randint(V, (B, T), generator=generator)
        self.labels_BT = torch.randint(V, (B, T), generator=generator)
        self.number, self.extra, self.num_prepared = number, extra, 0

    def to(self, device):
        return self


def objective(batch: ToyBatch, step: int, loss_factor: torch.Tensor | None = None) -> tuple:
    batch.num_prepared += 1
    context = {"factor": 0.5 + 0.01 * (batch.number % 100) + 0.1 * step, "extra": batch.extra}
    return batch.tokens_BT, context, batch.labels_BT


def build_layers() -> list[nn.Module]:
    torch.manual_seed(0)
    layers = [Embedding(), *(Block() for _ in range(NUM_BLOCKS)), Head()]
    for parameter in (parameter for layer in layers for parameter in layer.parameters()):
        nn.init.normal_(parameter, std=0.3)
    return layers


def accumulate(parameter: torch.Tensor, gradient: torch.Tensor) -> None:
    parameter.grad.add_(gradient)


def count_bytes(case: SimpleNamespace) -> list[int]:
    """Bytes that training steps of this rank send, counted as they happen in the only element of the list."""
    sent = [0]

    def counted(make_ops):
        def make_and_count(stage, chunk):
            ops = make_ops(stage, chunk)
            sent[0] += sum(op.tensor.nbytes for op in ops)
            return ops

        return make_and_count

    LeanStage.get_fwd_send_ops = counted(case.make_forward_ops)
    LeanStage.get_bwd_send_ops = counted(case.make_backward_ops)
    return sent


def run_case(case: SimpleNamespace, mesh: Mesh) -> dict:
    """Two training steps and one of twice the micro-batches, evaluations, logits, and a step with an infinite loss."""
    whole = Stack(build_layers())
    layers = copy.deepcopy(whole.layers)
    num_stages = mesh.pp.size * case.stages_per_rank
    ranges = plan_stages([0.5, *[1.0] * NUM_BLOCKS, 1.5], num_stages, case.stage_blocks)
    own = stages_of_rank(case.schedule, mesh.pp.size, case.stages_per_rank, mesh.pp.rank)
    own_layers = {index: layers[index] for stage in own for index in ranges[stage]}
    pairs = [
        (parameter, reference)
        for index, layer in own_layers.items()
        for parameter, reference in zip(layer.parameters(), whole.layers[index].parameters(), strict=True)
    ]
    flat = torch.zeros(sum(parameter.numel() for parameter, _ in pairs))
    pieces = flat.split([parameter.numel() for parameter, _ in pairs])
    for (parameter, _), piece in zip(pairs, pieces, strict=True):
        parameter.grad = piece.view_as(parameter)
    runner = build_pipeline(
        [Stack([layers[index] for index in ranges[stage]]) for stage in own], own, num_stages, case.schedule,
        (B, T, D), torch.float32, mesh.device, mesh.pp, objective, accumulate,
    )
    sent = count_bytes(case)
    result = {"rank": mesh.pp.rank, "own": own, "gaps": [], "loss_gaps": [], "eval_gaps": []}
    for step, growth in enumerate((1, 1, 2)):
        flat.zero_()
        batches = [ToyBatch(100 * step + index) for index in range(growth * case.num_micro_batches)]
        loss = runner.run(batches, step, SCALE)
        expected = reference_step(whole, batches, step)
        result["gaps"].append(max(gradient_gap(parameter, reference) for parameter, reference in pairs))
        result["loss_gaps"].append(relative_gap(loss, expected, num_stages - 1 in own))
        result["times_prepared"] = sorted({batch.num_prepared - 1 for batch in batches})
        result["buffers"] = count_buffers(runner, len(batches))
        result["eval_gaps"].append(evaluate(runner, whole, num_stages - 1 in own, case.num_micro_batches + step))
    result["bytes_sent"] = sent[0] // 4
    result["keeps_grad_views"] = all(
        parameter.grad.data_ptr() == piece.data_ptr() for (parameter, _), piece in zip(pairs, pieces, strict=True)
    )
    result["logits_gap"] = logits_gap(runner, whole)
    flat.zero_()
    extras = [float("inf") if index == 1 % case.num_micro_batches else 0.0 for index in range(case.num_micro_batches)]
    loss = runner.run([ToyBatch(index, extra) for index, extra in enumerate(extras)], 0, SCALE)
    result["is_finite"] = bool(torch.isfinite(flat).all())
    result["loss_is_finite"] = bool(torch.isfinite(loss))
    return result


def reference_step(whole: nn.Module, batches: list[ToyBatch], step: int) -> torch.Tensor:
    whole.zero_grad()
    losses = [whole(*objective(batch, step)) for batch in batches]
    (torch.stack(losses).sum() * SCALE).backward()
    return torch.stack(losses).detach().sum()


def gradient_gap(parameter: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference, as a share of the largest element."""
    return ((parameter.grad - reference.grad).abs().max() / reference.grad.abs().max()).item()


def relative_gap(found, expected: torch.Tensor, holds_last: bool) -> float:
    """Ranks without the last stage must give zero."""
    expected = float(expected) if holds_last else 0.0
    return abs(float(found) - expected) / max(abs(expected), 1.0)


@torch.no_grad()
def evaluate(runner: PipelineRunner, whole: nn.Module, holds_last: bool, num_batches: int) -> float:
    batches = [ToyBatch(900 + index) for index in range(num_batches)]
    found = runner.evaluate(batches)
    assert all(stage.training for stage in runner.stages.values())
    return relative_gap(found, sum(whole(*objective(batch, 0)) for batch in batches), holds_last)


@torch.no_grad()
def logits_gap(runner: PipelineRunner, whole: nn.Module) -> float:
    """On one row of another length than in training."""
    tokens, last_B = torch.tensor([[3, 1, 4, 1, 5]]), torch.tensor([3])
    found = runner.logits(tokens, {"factor": 1.0}, last_B, (1, 5, D), V)
    return (found - whole(tokens, {"factor": 1.0}, None, last_B)).abs().max().item()


def count_buffers(runner: PipelineRunner, num_micro_batches: int) -> int:
    schedule = runner.schedule_of(num_micro_batches)
    stages = [schedule._stage] if hasattr(schedule, "_stage") else schedule._stages
    infos = [infos for stage in stages for kept in (stage.args_recv_info, stage.grad_recv_info)
             for infos in kept.values()]
    return sum(info.buffer is not None for each in infos for info in each)


def main() -> None:
    torch.set_num_threads(1)
    info = read_rank_info(dict(os.environ))
    mesh = build_mesh(Layout(pp=info.world_size), info, timeout_s=60)
    original = {"make_forward_ops": LeanStage.get_fwd_send_ops, "make_backward_ops": LeanStage.get_bwd_send_ops}
    for case in json.loads(sys.argv[1]):
        print(json.dumps(run_case(SimpleNamespace(**case, **original), mesh)), flush=True)
    close_mesh()


if __name__ == "__main__":
    main()
