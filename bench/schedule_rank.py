"""One rank of `bench.schedule_trace`: a pipeline of stages that sleep, and the times of all that it does.

Argument: the options of `bench.schedule_trace.trace_schedules` as JSON. Prints one line a case: the boxes of each step.
"""

import json
import os
import sys
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.pipelining.schedules import _PipelineSchedule

from bench.schedule_trace import Box
from megascale.engine.pipeline import LeanStage, build_pipeline
from megascale.parallel.deferred import WeightGradients
from megascale.parallel.layout import Layout
from megascale.parallel.mesh import Mesh, build_mesh, close_mesh, read_rank_info
from megascale.parallel.stages import stages_of_rank

HIDDEN_SHAPE = (1, 16, 16)


class Sleep(torch.autograd.Function):
    """Takes a unit of time forward, one for the input's gradient and one for a weight's, which may wait."""

    @staticmethod
    def forward(ctx, inputs: torch.Tensor, weight: torch.Tensor, unit_s: float, deferred: WeightGradients | None):
        ctx.weight, ctx.unit_s, ctx.deferred = weight, unit_s, deferred
        time.sleep(unit_s)
        return inputs * 1.0

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        def compute() -> torch.Tensor:
            time.sleep(ctx.unit_s)
            return torch.zeros_like(ctx.weight)

        time.sleep(ctx.unit_s)
        if ctx.deferred is None:
            return grad, compute(), None, None
        ctx.deferred.add(ctx.weight, compute)
        return grad, None, None, None


class SleepingStage(nn.Module):
    def __init__(self, unit_s: float, is_last: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.unit_s, self.is_last = unit_s, is_last
        self.deferred: WeightGradients | None = None

    def forward(self, inputs: torch.Tensor, context: object, labels: object) -> torch.Tensor:
        hidden = Sleep.apply(inputs, self.weight, self.unit_s, self.deferred)
        return hidden.sum() if self.is_last else hidden


class NumberedBatch:
    def to(self, device: torch.device) -> "NumberedBatch":
        return self


def record(schedule: _PipelineSchedule, boxes: list[Box]) -> None:
    """Makes the stages of a schedule note the time of all that they do from now on."""
    for stage in getattr(schedule, "_stages", None) or [schedule._stage]:
        watch(stage, "forward_one_chunk", boxes, lambda kwargs: "F")
        watch(stage, "backward_one_chunk", boxes, lambda kwargs: "B" if kwargs.get("full_backward", True) else "I")
        watch(stage, "backward_weight_one_chunk", boxes, lambda kwargs: "W")


def watch(stage: LeanStage, name: str, boxes: list[Box], kind_of: Callable[[dict], str]) -> None:
    """Replaces a method of one stage by the same with a stopwatch. The clock is one for all processes of a machine."""
    method = getattr(stage, name)

    def timed(micro_batch: int, *args, **kwargs):
        start = time.perf_counter()
        result = method(micro_batch, *args, **kwargs)
        boxes.append(Box(kind_of(kwargs), stage.stage_index, micro_batch, start, time.perf_counter()))
        return result

    setattr(stage, name, timed)


def trace_case(case: dict, num_micro_batches: int, num_steps: int, mesh: Mesh) -> list[list[Box]]:
    """The boxes of this rank in each step, after one to warm up."""
    schedule, stages_per_rank = case["schedule"], case["stages_per_rank"]
    num_stages = mesh.pp.size * stages_per_rank
    own = stages_of_rank(schedule, mesh.pp.size, stages_per_rank, mesh.pp.rank)
    stages = [SleepingStage(case["unit_s"], index == num_stages - 1) for index in own]
    runner = build_pipeline(
        stages, own, num_stages, schedule, HIDDEN_SHAPE, torch.float32, mesh.device, mesh.pp,
        lambda batch, step, factor: (torch.zeros(HIDDEN_SHAPE), None, None), lambda parameter, gradient: None,
    )
    boxes: list[Box] = []
    record(runner.schedule_of(num_micro_batches), boxes)
    steps = []
    for step in range(num_steps + 1):
        boxes.clear()
        mesh.barrier()
        runner.run([NumberedBatch()] * num_micro_batches, step, 1.0)
        steps.append(boxes.copy())
    return steps[1:]


def main() -> None:
    torch.set_num_threads(1)
    options = json.loads(sys.argv[1])
    info = read_rank_info(dict(os.environ))
    mesh = build_mesh(Layout(pp=info.world_size), info, timeout_s=120)
    for case in options["cases"]:
        print(json.dumps(trace_case(case, options["num_micro_batches"], options["num_steps"], mesh)), flush=True)
    close_mesh()


if __name__ == "__main__":
    main()
