"""What each pipeline schedule asks of a layout, without torch: stages per rank, micro-batches, deferred weights.

The numbers are those of the classes in `torch/distributed/pipelining/schedules.py` (torch 2.13), which drive them.
"""

from dataclasses import dataclass
from itertools import count


@dataclass(frozen=True)
class ScheduleRules:
    """What one schedule asks for.

    Attributes:
        stages_per_rank: stages of one rank when the config doesn't say.
        min_stages_per_rank: fewest that make sense.
        max_stages_per_rank: most that it can drive; None: any number.
        fills_stages: at least one micro-batch for each stage.
        has_rounds: micro-batches run in rounds of at least pp, all of the same size.
        defers_weights: weight gradients are computed later than those of the inputs, to fill idle time.
    """

    stages_per_rank: int
    min_stages_per_rank: int
    max_stages_per_rank: int | None
    fills_stages: bool = False
    has_rounds: bool = False
    defers_weights: bool = False


SCHEDULES = {
    "gpipe": ScheduleRules(1, 1, 1),
    "1f1b": ScheduleRules(1, 1, 1, fills_stages=True),
    "interleaved_1f1b": ScheduleRules(2, 2, None, has_rounds=True),
    "zero_bubble": ScheduleRules(2, 1, None, has_rounds=True, defers_weights=True),
    "zero_bubble_v": ScheduleRules(2, 2, 2, defers_weights=True),
    "dualpipe_v": ScheduleRules(2, 2, 2, fills_stages=True, defers_weights=True),
}


def takes_micro_batches(schedule: str, pp: int, stages_per_rank: int, num_micro_batches: int) -> bool:
    """Whether the schedule can run that many micro-batches over pp ranks."""
    rules = SCHEDULES[schedule]
    if rules.fills_stages and num_micro_batches < pp * stages_per_rank:
        return False
    return not (rules.has_rounds and num_micro_batches % num_rounds(pp, num_micro_batches))


def num_rounds(pp: int, num_micro_batches: int) -> int:
    """Rounds of at least pp micro-batches that the looped schedules run: as many as there can be."""
    return max(1, num_micro_batches // pp)


def nearest_micro_batches(schedule: str, pp: int, stages_per_rank: int, num_micro_batches: int) -> list[int]:
    """The nearest legal number below, where there is one, and the nearest above.

    >>> nearest_micro_batches("interleaved_1f1b", pp=4, stages_per_rank=2, num_micro_batches=9)
    [8, 10]
    >>> nearest_micro_batches("1f1b", pp=4, stages_per_rank=1, num_micro_batches=3)
    [4]
    """
    def is_legal(number: int) -> bool:
        return takes_micro_batches(schedule, pp, stages_per_rank, number)

    below = next(filter(is_legal, range(num_micro_batches - 1, 0, -1)), None)
    above = next(filter(is_legal, count(num_micro_batches + 1)))
    return [above] if below is None else [below, above]


def micro_batch_rule(schedule: str, pp: int, stages_per_rank: int, num_micro_batches: int) -> str:
    """The rule that `takes_micro_batches` applies, in words and numbers."""
    if SCHEDULES[schedule].fills_stages:
        num_stages = pp * stages_per_rank
        return f"it starts with one micro-batch in each of its {num_stages} stages, so it needs {num_stages} or more"
    rounds = num_rounds(pp, num_micro_batches)
    return f"it runs rounds of {pp} or more, here {rounds}, of the same size, and {rounds} must divide their number"


def schedules_that_take(pp: int, stages_per_rank: int, num_micro_batches: int) -> list[str]:
    """The schedules that run these micro-batches with that many stages per rank as their default."""
    names = [name for name, rules in SCHEDULES.items() if rules.stages_per_rank == stages_per_rank]
    return [name for name in names if takes_micro_batches(name, pp, stages_per_rank, num_micro_batches)]
