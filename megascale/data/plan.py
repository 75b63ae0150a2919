"""What a run will read of each corpus, counted before it starts, for `megascale check` and the training log. Pure."""

from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from megascale.config.batch_plan import BatchPlan
from megascale.config.data import DataConfig
from megascale.data.mixture import Budget, budgets_of
from megascale.data.order import RowOrder
from megascale.errors import DataError


class PlannedPart(NamedTuple):
    """What one stage reads of one corpus.

    Attributes:
        name: of the corpus.
        rows: that the stage reads of it.
        share: of the rows of the stage.
        tokens: in these rows; exact for whole epochs, in proportion otherwise.
        epochs: of the corpus that the run has read at the end of the stage.
    """

    name: str
    rows: int
    share: float
    tokens: int
    epochs: float


class PlannedStage(NamedTuple):
    """What a stage reads: steps [first_step, stop_step), and a part of each corpus that it reads."""

    first_step: int
    stop_step: int
    parts: tuple[PlannedPart, ...]


class ReadingPlan(NamedTuple):
    """What a run reads.

    Attributes:
        stages: of the mixture, as far as the run reaches them.
        second_epochs: corpora of which the run reads rows again, each with the first step that does.
    """

    stages: tuple[PlannedStage, ...]
    second_epochs: tuple[tuple[str, int], ...]


def plan_reading(
    order: RowOrder, num_tokens: Sequence[int], data: DataConfig, seq_len: int, batches: BatchPlan, max_steps: int
) -> ReadingPlan:
    """Counts what a run will read.

    Args:
        order: of the run; its corpora are those of `data`.
        num_tokens: tokens of each corpus.
        data: the config's section, for its limits.
        seq_len: input tokens of a row.
        batches: the rows of each step.
        max_steps: steps of the run.

    Raises:
        DataError: a corpus would be read more often than its `max_epochs`, or further than its budget.
    """
    for corpus, limit, rounding in _limits_of(order, data, seq_len, batches, max_steps):
        _check_limit(order, corpus, limit, rounding, batches, max_steps)
    first_steps = [_step_of_row(batches, stage.first_row, max_steps) for stage in order.stages]
    stops = [*first_steps[1:], max_steps]
    stages = tuple(
        _plan_stage(order, num_tokens, batches, first, stop)
        for first, stop in zip(first_steps, stops, strict=True) if first < stop
    )
    steps = {
        corpus.name: _first_step_beyond(order, number, order.num_rows[number], batches, max_steps)
        for number, corpus in enumerate(order.corpora)
    }
    return ReadingPlan(stages, tuple((name, step) for name, step in steps.items() if step < max_steps))


def describe_plan(plan: ReadingPlan) -> list[tuple[str, str]]:
    """Lines of (name, text), one for each stage and for each corpus that it reads."""
    lines = []
    for stage in plan.stages:
        rows = sum(part.rows for part in stage.parts)
        tokens = sum(part.tokens for part in stage.parts)
        steps = f"steps {stage.first_step:,} to {stage.stop_step - 1:,}"
        lines.append(("reads", f"{steps}: {rows:,} rows, {tokens:,} tokens"))
        lines += [(f"  {part.name}", _describe_part(part)) for part in stage.parts]
    again = ", ".join(f"{name} from step {step:,}" for name, step in plan.second_epochs)
    return [*lines, ("reads again", again or "nothing: no corpus is read twice")]


def _describe_part(part: PlannedPart) -> str:
    return f"{part.share:.2%}: {part.rows:,} rows, {part.tokens:,} tokens; {part.epochs:.3f} epochs by then"


def _plan_stage(
    order: RowOrder, num_tokens: Sequence[int], batches: BatchPlan, first_step: int, stop_step: int
) -> PlannedStage:
    before, after = (order.rows_before(batches.first_row(step)).tolist() for step in (first_step, stop_step))
    total, parts = sum(after) - sum(before), []
    for corpus, num_rows, tokens, first, stop in zip(
        order.corpora, order.num_rows, num_tokens, before, after, strict=True
    ):
        if stop > first:
            read = stop * tokens // num_rows - first * tokens // num_rows
            parts.append(PlannedPart(corpus.name, stop - first, (stop - first) / total, read, stop / num_rows))
    return PlannedStage(first_step, stop_step, tuple(parts))


def _step_of_row(batches: BatchPlan, row_number: int, max_steps: int) -> int:
    """The step that begins with a row, or `max_steps` when none before it does."""
    return bisect_left(range(max_steps), row_number, key=batches.first_row)


def _first_step_beyond(order: RowOrder, corpus: int, limit: Fraction | int, batches: BatchPlan, max_steps: int) -> int:
    """The first step that reads more than so many rows of a corpus, or `max_steps` when none does."""
    return bisect_left(
        range(max_steps), True,
        key=lambda step: int(order.rows_before(batches.first_row(step + 1))[corpus]) > limit,
    )


def _limits_of(
    order: RowOrder, data: DataConfig, seq_len: int, batches: BatchPlan, max_steps: int
) -> list[tuple[int, Budget, int]]:
    """What bounds the reading: a corpus, its limit, and the rows that rounding may add to it."""
    rows = {corpus.name: num_rows for corpus, num_rows in zip(order.corpora, order.num_rows, strict=True)}
    budgets, limits = budgets_of(data, rows, seq_len), []
    # A budget is met to the resolution of a period, to a row, and in the last step of its horizon.
    rounding = batches.first_row(max_steps) // order.period + 1 + batches.rows_of(max_steps - 1)
    for corpus, (name, num_rows) in enumerate(rows.items()):
        most, slack = data.sources[name].max_epochs, rounding if name in budgets else 0
        if name in budgets:
            limits.append((corpus, budgets[name], slack))
        if most is not None:
            text = f"data.corpora.{name}.max_epochs = {most:g}"
            limits.append((corpus, Budget(Fraction(most) * num_rows, text), slack))
    return limits


def _check_limit(
    order: RowOrder, corpus: int, limit: Budget, rounding: int, batches: BatchPlan, max_steps: int
) -> None:
    num_rows, read = order.num_rows[corpus], int(order.rows_before(batches.first_row(max_steps))[corpus])
    if read <= limit.rows + rounding:
        return
    step = _first_step_beyond(order, corpus, limit.rows, batches, max_steps)
    shorter = f"lower train.max_steps to {step} or less, " if step else ""
    raise DataError(
        f"{limit.text} allows {int(limit.rows):,} rows of the corpus, which has {num_rows:,}; the run of {max_steps:,} "
        f"steps would read {read:,}, which is {read / num_rows:.3f} epochs, and go beyond the limit in step {step:,}; "
        f"{shorter}give the corpus less of the mixture, raise the limit, or build it from more text"
    )
