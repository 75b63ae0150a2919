"""Which layers make a pipeline stage, which rank runs it, in which order, and how long a schedule idles at best.

Pure arithmetic: p pipeline ranks with v stages each, m micro-batches of a step. Stages are numbered along the model.
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from megascale.errors import ConfigError

V_SHAPED = ("zero_bubble_v", "dualpipe_v")
"""Schedules in which the model runs down the ranks and up again: the first and the last stage share a rank."""

IDLE_UNITS = {"gpipe": 3, "1f1b": 3, "interleaved_1f1b": 3, "zero_bubble": 1, "zero_bubble_v": 1, "dualpipe_v": 2}
"""Units of a stage's forward pass that a rank idles for each other rank, see `ideal_idle_fraction`."""


def stages_of_rank(schedule: str, pp: int, stages_per_rank: int, pp_rank: int) -> list[int]:
    """The stages of one pipeline rank, in the model's order.

    Looped schedules go round the ranks (Narayanan et al. 2021, arXiv 2104.04473, section 2.2), V-shaped ones down and
    up again (Qi et al. 2023, arXiv 2401.10241, section 6).

    >>> stages_of_rank("interleaved_1f1b", pp=2, stages_per_rank=2, pp_rank=0)
    [0, 2]
    >>> stages_of_rank("zero_bubble_v", pp=2, stages_per_rank=2, pp_rank=0)
    [0, 3]
    """
    stages = range(pp * stages_per_rank)
    return [stage for stage in stages if rank_of_stage(schedule, pp, stage) == pp_rank]


def rank_of_stage(schedule: str, pp: int, stage: int) -> int:
    """The pipeline rank that runs a stage."""
    turn, step = divmod(stage, pp)
    return pp - 1 - step if schedule in V_SHAPED and turn % 2 else step


def forward_order(schedule: str, pp: int, stages_per_rank: int, num_micro_batches: int) -> list[tuple[int, int]]:
    """(stage, micro-batch) of all forward passes without backward ones, in one order for all ranks.

    Ranks that take their own part of it are all at work but for p - 1 passes at each end, and never wait for each other
    in a circle, even when a message leaves only once it is received: every pair of ranks meets its messages in the
    same order. At most 2 p micro-batches are on their way, p + 1 in V-shaped schedules.
    """

    def time_of(stage: int, micro_batch: int) -> int:
        if schedule in V_SHAPED:
            return stage + stages_per_rank * micro_batch
        return stage + (micro_batch // pp) * stages_per_rank * pp + micro_batch % pp

    passes = [(stage, index) for stage in range(pp * stages_per_rank) for index in range(num_micro_batches)]
    return sorted(passes, key=lambda each: (time_of(*each), each))


def ideal_idle_fraction(schedule: str, pp: int, stages_per_rank: int, num_micro_batches: int) -> float:
    """Share of a step in which a rank idles, for a schedule that is full, with equal stages and messages of no cost.

    A forward pass F, the inputs' gradient and the weights' gradient W take a stage one unit each, a backward pass B is
    both, and a step ends for all ranks at once. Beside 3 v m units of work a rank waits

    - (p-1)(F + B) = 3 (p-1): (p-1) / (m+p-1) for gpipe and 1f1b, (p-1) / (v m+p-1) interleaved;
    - (p-1)(F + B - 2 W) = p-1 in zero_bubble and zero_bubble_v: "zero" is a matter of the step's end, where without a
      sum over ranks the rest would be a shift and not a wait;
    - (p-1)(F&B + B - 3 W) = 2 (p-1) in dualpipe_v, whose pairs F&B run here one after the other.

    A schedule is full from m = p on; zero_bubble_v from 2 p - 1 on, dualpipe_v from 2 p on.

    Source: Narayanan et al. 2021, arXiv 2104.04473, section 2.2; Qi et al. 2023, arXiv 2401.10241, section 2.3 (ZB-H1)
        and section 6 (ZB-V); DeepSeek-AI 2024, arXiv 2412.19437, section 3.2.1.
    """
    idle = (pp - 1) * IDLE_UNITS[schedule]
    return idle / (3 * stages_per_rank * num_micro_batches + idle)


def plan_stages(costs: Sequence[float], num_stages: int, stage_blocks: Sequence[int] | None = None) -> list[range]:
    """The layers of each stage: balanced by cost, or as asked for by hand.

    Args:
        costs: of each layer of the model, in any unit: the embedding, the blocks, then all that follows them.
        stage_blocks: blocks of each stage, or None.
    """
    if stage_blocks is None:
        return split_layers(costs, num_stages)
    return split_by_hand(stage_blocks, len(costs), num_stages)


def split_layers(costs: Sequence[float], num_stages: int) -> list[range]:
    """Cuts a list of layers into stages so that the dearest stage costs as little as can be.

    Among such cuts it takes the one with the least sum of squared costs, which evens out the other stages too, and
    among those the one that gives the first stages fewer layers: they hold the most micro-batches in memory.

    Cost: layers^2 x stages operations, less than a second for 200 layers in 64 stages.

    Raises:
        ConfigError: fewer layers than stages.

    >>> split_layers([1, 4, 4, 4, 4, 3], 2)
    [range(0, 3), range(3, 6)]
    """
    num_layers = len(costs)
    if num_layers < num_stages:
        raise ConfigError(
            f"{num_stages} pipeline stages for {num_layers} layers, with the embedding and the head: every stage needs"
            f" one or more; use at most {num_layers} stages (pp x virtual stages)"
        )
    sums = [0, *accumulate(costs)]
    limit = best_cuts(sums, num_stages, lambda cost, rest: max(cost, rest))[0]

    def squares(cost: float, rest: float) -> float:
        return cost**2 + rest if cost <= limit else math.inf

    cuts = best_cuts(sums, num_stages, squares)[1]
    return [range(start, stop) for start, stop in pairwise(cuts)]


def best_cuts(
    sums: Sequence[float], num_stages: int, combine: Callable[[float, float], float]
) -> tuple[float, tuple[int, ...]]:
    """The least value over all ways to cut a list into non-empty runs, and the places of the cuts, both ends included.

    Args:
        sums: cost of the first i layers for each i.
        combine: (cost of a run, value of those after it) -> value of both.
    """
    last = len(sums) - 1
    best = {last: (0.0, (last,))}  # start of the rest -> its value and cuts
    for num_rest in range(1, num_stages + 1):
        num_before = num_stages - num_rest
        starts = range(num_before, last - num_rest + 1) if num_before else [0]
        best = {
            start: min(
                (combine(sums[stop] - sums[start], value), (start, *cuts))
                for stop, (value, cuts) in best.items()
                if stop > start
            )
            for start in starts
        }
    return best[0]


def split_by_hand(stage_blocks: Sequence[int], num_layers: int, num_stages: int) -> list[range]:
    """The layers of each stage from its number of blocks: the first also gets the embedding, the last what follows.

    Raises:
        ConfigError: another number of stages, a stage without a block, or more blocks than there are.

    >>> split_by_hand([1, 2], num_layers=6, num_stages=2)
    [range(0, 2), range(2, 6)]
    """
    if len(stage_blocks) != num_stages:
        raise ConfigError(
            f"{list(stage_blocks)} gives the blocks of {len(stage_blocks)} stages, and the pipeline has {num_stages}"
            f" (pp x virtual stages); give {num_stages} numbers"
        )
    if min(stage_blocks) < 1 or sum(stage_blocks) >= num_layers:
        raise ConfigError(
            f"{list(stage_blocks)} blocks a stage, {sum(stage_blocks)} in all: every stage needs one or more, and the"
            f" {num_layers} layers of the model include the embedding and the head; give numbers that sum to its blocks"
        )
    stops = [1 + total for total in accumulate(stage_blocks)]
    return [range(start, stop) for start, stop in zip([0, *stops[:-1]], [*stops[:-1], num_layers], strict=True)]
