"""How long ranks idle in each pipeline schedule: a traced step against the closed form, and the same as a picture.

Each rank's forward, backward and weight-gradient boxes are taken from a step of the engine's own pipeline runner. Its
stages only sleep, each for the same time, so that the shape of the schedule shows even where ranks outnumber cores;
what a measured step takes beyond the ideal is the schedule's own cost: messages, Python, the operating system.

    python -m bench.schedule_trace --pp 4 --micro-batches 8 --picture docs/images/schedules.png
"""

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import nn
from torch.distributed.pipelining.stage import _PipelineStageBase

from bench.figures import describe_machine, show_head, show_row
from megascale.config.schedules import SCHEDULES
from megascale.engine.pipeline import SCHEDULE_CLASSES
from megascale.parallel.stages import ideal_idle_fraction, stages_of_rank
from tests.support.ranks import run_ranks

KINDS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
"""Torch's names of what a rank does -> ours. B is I and W at once."""
UNITS = {"F": 1, "B": 2, "I": 1, "W": 1}
COLUMNS = ("schedule", "stages a rank", "closed-form idle", "traced idle", "ideal step, ms", "traced step, ms", "ratio")


class Action(NamedTuple):
    """What a rank does once in a step.

    Attributes:
        is_held: whether torch sends its result only after the next action, with which it is a pair (DualPipeV).
    """

    kind: str
    stage: int
    micro_batch: int
    is_held: bool = False


class Box(NamedTuple):
    """An action with its times, in any unit."""

    kind: str
    stage: int
    micro_batch: int
    start: float
    end: float


class StageFacts(_PipelineStageBase):
    """As much of a stage as a schedule looks at to lay out its actions: no module, no process group."""

    def __init__(self, index: int, num_stages: int, pp: int):
        self.stage_index, self.num_stages, self.group_size, self.group_rank = index, num_stages, pp, 0
        self.submod = nn.Identity()

    def _prepare_forward_infra(self, *args, **kwargs):
        """Of an abstract method that is never called: no step is run on these facts."""
        raise NotImplementedError

    _prepare_backward_infra = _create_grad_recv_info = _prepare_forward_infra


def build_torch_schedule(schedule: str, pp: int, stages_per_rank: int, num_micro_batches: int):
    """Torch's schedule as the first rank makes it; it knows the actions of all ranks.

    Raises:
        ValueError: the schedule can't take that many micro-batches.
    """
    own = stages_of_rank(schedule, pp, stages_per_rank, 0)
    stages = [StageFacts(index, pp * stages_per_rank, pp) for index in own]
    is_single = SCHEDULES[schedule].max_stages_per_rank == 1
    return SCHEDULE_CLASSES[schedule](stages[0] if is_single else stages, num_micro_batches, loss_fn=max)


def torch_actions(schedule: str, pp: int, stages_per_rank: int, num_micro_batches: int) -> list[list[Action]]:
    """What each rank does in a step, in torch's order."""
    if schedule == "1f1b":  # torch's own list of it, which nothing runs, leaves out micro-batches of the last rank
        return [one_forward_one_backward(rank, pp, num_micro_batches) for rank in range(pp)]
    order = build_torch_schedule(schedule, pp, stages_per_rank, num_micro_batches).pipeline_order
    return [
        [
            Action(KINDS[part.computation_type.name], part.stage_index, part.microbatch_index, part is not parts[-1])
            for parts in (action.sub_actions or (action,) for action in order[rank] if action is not None)
            for part in parts
            if part.computation_type.name in KINDS
        ]
        for rank in range(pp)
    ]


def one_forward_one_backward(rank: int, pp: int, num_micro_batches: int) -> list[Action]:
    """A rank's part of 1F1B: as many forwards as there are stages from it on, then backward and forward in turn."""
    num_ahead = min(pp - rank, num_micro_batches)
    actions = [Action("F", rank, index) for index in range(num_ahead)]
    for index in range(num_micro_batches):
        actions.append(Action("B", rank, index))
        if index + num_ahead < num_micro_batches:
            actions.append(Action("F", rank, index + num_ahead))
    return actions


def unit_boxes(actions: Sequence[Sequence[Action]], num_stages: int, unit: float = 1.0) -> list[list[Box]]:
    """Times of actions that start as soon as their rank is free and what they need is there; messages take no time.

    Raises:
        ValueError: the orders of the ranks wait for each other in a circle.
    """
    boxes: list[list[Box]] = [[] for _ in actions]
    ends: dict[tuple[str, int, int], float] = {}
    held: list[list[tuple[str, int, int]]] = [[] for _ in actions]
    num_left = sum(map(len, actions))
    while num_left:
        num_before = num_left
        for own, done, waiting in zip(actions, boxes, held, strict=True):
            while len(done) < len(own):
                kind, stage, index, is_held = own[len(done)]
                needed = needs(kind, stage, index, num_stages)
                if not needed <= ends.keys():
                    break
                start = max([done[-1].end if done else 0.0, *(ends[each] for each in needed)])
                end = start + UNITS[kind] * unit
                waiting.append(("B" if kind == "I" else kind, stage, index))
                if not is_held:
                    ends |= dict.fromkeys(waiting, end)
                    waiting.clear()
                done.append(Box(kind, stage, index, start, end))
                num_left -= 1
        if num_left == num_before:
            raise ValueError(f"{num_left} actions wait for each other")
    return boxes


def needs(kind: str, stage: int, micro_batch: int, num_stages: int) -> set[tuple[str, int, int]]:
    """What must be done before an action; I counts as B, as it is what the stage before waits for."""
    if kind == "F":
        return {("F", stage - 1, micro_batch)} if stage else set()
    if kind == "W":
        return {("B", stage, micro_batch)}
    after = {("B", stage + 1, micro_batch)} if stage < num_stages - 1 else set()
    return {("F", stage, micro_batch), *after}


def idle_fraction(boxes: Sequence[Sequence[Box]]) -> float:
    """Share of the time from the first start to the last end in which a rank has no box, over all ranks."""
    start = min(box.start for row in boxes for box in row)
    end = max(box.end for row in boxes for box in row)
    busy = sum(box.end - box.start for row in boxes for box in row)
    return 1.0 - busy / (len(boxes) * (end - start))


def step_seconds(boxes: Sequence[Sequence[Box]]) -> float:
    """Time from the first start to the last end."""
    return max(box.end for row in boxes for box in row) - min(box.start for row in boxes for box in row)


def trace_schedules(pp: int, num_micro_batches: int, rank_s: float, num_steps: int) -> dict[str, list[list[Box]]]:
    """The quickest traced step of each schedule that takes that many micro-batches, as boxes of each rank.

    Args:
        rank_s: seconds of a forward pass of one micro-batch through all stages of a rank.
    """
    cases = [
        {"schedule": name, "stages_per_rank": rules.stages_per_rank, "unit_s": rank_s / rules.stages_per_rank}
        for name, rules in SCHEDULES.items()
    ]
    options = {"cases": cases, "num_micro_batches": num_micro_batches, "num_steps": num_steps}
    with tempfile.TemporaryDirectory() as folder:
        texts = run_ranks("bench.schedule_rank", pp, [json.dumps(options)], Path(folder), timeout_s=500)
    ranks = [[json.loads(line) for line in text.splitlines()] for text in texts]  # rank, case, step, box
    traces = {}
    for case, steps_of_ranks in zip(cases, zip(*ranks, strict=True), strict=True):
        steps = [[[Box(*box) for box in row] for row in rows] for rows in zip(*steps_of_ranks, strict=True)]
        traces[case["schedule"]] = min(steps, key=step_seconds)
    return traces


def table_row(schedule: str, boxes: list[list[Box]], num_micro_batches: int, rank_s: float) -> list[str]:
    """A schedule's row of the table."""
    pp, stages_per_rank = len(boxes), SCHEDULES[schedule].stages_per_rank
    actions = torch_actions(schedule, pp, stages_per_rank, num_micro_batches)
    ideal_s = step_seconds(unit_boxes(actions, pp * stages_per_rank, rank_s / stages_per_rank))
    closed_form = ideal_idle_fraction(schedule, pp, stages_per_rank, num_micro_batches)
    traced_s = step_seconds(boxes)
    return [
        schedule, str(stages_per_rank), f"{closed_form:.3f}", f"{idle_fraction(boxes):.3f}", f"{1e3 * ideal_s:.0f}",
        f"{1e3 * traced_s:.0f}", f"{traced_s / ideal_s:.3f}",
    ]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pp", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--rank-ms", type=float, default=60.0, help="forward of a micro-batch on a rank")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--picture", type=Path, default=None, help="PNG or SVG file to draw the traced steps into")
    options = parser.parse_args(arguments)
    logging.getLogger("torch.distributed.pipelining").setLevel(logging.ERROR)
    rank_s = options.rank_ms / 1e3
    traces = trace_schedules(options.pp, options.micro_batches, rank_s, options.steps)
    print(f"{describe_machine(['torch'])}\npp {options.pp}, {options.micro_batches} micro-batches; sleeping stages,"
          f" {options.rank_ms:g} ms of forward a rank; quickest of {options.steps} steps\n")
    print(show_head(COLUMNS))
    for schedule, boxes in traces.items():
        print(show_row(table_row(schedule, boxes, options.micro_batches, rank_s)))
    if options.picture is not None:
        from bench.schedule_picture import draw_schedules

        draw_schedules(traces, options.picture)


if __name__ == "__main__":
    main(sys.argv[1:])
