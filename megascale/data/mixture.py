"""How many rows of each corpus a run reads: the weights, epochs and tokens of a config as exact counts. Pure.

A mixture is resolved to whole rows of each corpus in every PERIOD rows of a lane. Shares are fractions without
rounding until then, so that a mixture doesn't depend on the order of sums.
"""

from bisect import bisect_left
from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

from megascale.config.batch_plan import BatchPlan
from megascale.config.data import CorpusConfig, DataConfig
from megascale.errors import ConfigError

PERIOD = 1 << 14
"""Shares are multiples of 1/16384: fine enough for a corpus of 0.01 %, and the table of a period is quick to build."""


class MixtureStage(NamedTuple):
    """A mixture and the row number from which it holds.

    Attributes:
        first_row: 0, or the first row of a step.
        counts: rows of each corpus in a period, in the order of names; they sum to the period.
    """

    first_row: int
    counts: tuple[int, ...]


class Budget(NamedTuple):
    """What a corpus with `epochs` or `tokens` is asked for: its rows, exactly, and how the config says it."""

    rows: Fraction
    text: str


def resolve_mixture(
    data: DataConfig, rows: Mapping[str, int], seq_len: int, batches: BatchPlan, max_steps: int
) -> tuple[MixtureStage, ...]:
    """The mixtures of a run, the first one from row 0.

    Args:
        data: the config's section.
        rows: rows of each corpus, by name.
        seq_len: input tokens of a row, in which budgets of tokens are counted.
        batches: the rows of each step.
        max_steps: steps of the run.

    Raises:
        ConfigError: a share that rounds to nothing, or budgets that don't fit the run.
    """
    budgets = budgets_of(data, rows, seq_len)
    weights = {name: Fraction(source.weight or 0) for name, source in data.sources.items() if name not in budgets}
    if budgets:
        counts = _share_out_budgets(data, budgets, weights, batches, max_steps)
    else:
        counts = _share_out_weights(weights, PERIOD, "data.corpora.{}.weight")
    stages = [MixtureStage(0, tuple(counts[name] for name in data.sources))]
    for number, stage in enumerate(data.stages):
        weights = {name: Fraction(stage.weights.get(name, 0)) for name in data.sources}
        counts = _share_out_weights(weights, PERIOD, f"data.stages.{number}.weights.{{}}")
        stages.append(MixtureStage(batches.first_row(stage.from_step), tuple(counts.values())))
    return tuple(stages)


def budgets_of(data: DataConfig, rows: Mapping[str, int], seq_len: int) -> dict[str, Budget]:
    """The budgets of the corpora that have one, by name."""
    return {
        name: _budget_of(name, source, rows[name], seq_len)
        for name, source in data.sources.items() if source.weight is None
    }


def steps_to_read(batches: BatchPlan, rows: Fraction | int) -> int:
    """The fewest steps that read at least so many rows."""
    return bisect_left(range(int(rows) + 1), rows, key=batches.first_row)


def _budget_of(name: str, source: CorpusConfig, rows: int, seq_len: int) -> Budget:
    if source.epochs is not None:
        return Budget(Fraction(source.epochs) * rows, f"data.corpora.{name}.epochs = {source.epochs:g}")
    return Budget(Fraction(source.tokens, seq_len), f"data.corpora.{name}.tokens = {source.tokens:,}")


def _share_out_weights(weights: Mapping[str, Fraction], period: int, field: str) -> dict[str, int]:
    """Parts of a period in proportion to weights, the remainders to the largest."""
    total = sum(weights.values())
    counts = _round_to_largest({name: weight / total for name, weight in weights.items()}, period)
    for name, weight in weights.items():
        if weight > 0 and counts[name] == 0:
            _refuse_weight(field.format(name), weight, total, period)
    return counts


def _share_out_budgets(
    data: DataConfig, budgets: Mapping[str, Budget], weights: Mapping[str, Fraction], batches: BatchPlan, max_steps: int
) -> dict[str, int]:
    """Parts of a period for budgets, rounded down, and for weights what is left; budgets alone take all of it."""
    length = f"data.horizon_steps = {data.horizon_steps}" if data.horizon_steps else f"train.max_steps = {max_steps}"
    horizon_steps = data.horizon_steps or max_steps
    horizon_rows, asked = batches.first_row(horizon_steps), sum(budget.rows for budget in budgets.values())
    texts, steps = ", ".join(budget.text for budget in budgets.values()), steps_to_read(batches, asked)
    if asked > horizon_rows:
        fraction = int(10_000 * horizon_rows / asked) / 10_000
        raise ConfigError(
            f"{texts}: together {_count(asked)} rows, more than the {horizon_rows:,} rows of {length}; set it to "
            f"{steps} or more, or multiply the budgets by {fraction:g} or less"
        )
    if not any(weights.values()):
        if asked <= batches.first_row(horizon_steps - 1):
            raise ConfigError(
                f"{texts}: together {_count(asked)} rows, {_count(horizon_rows - asked)} fewer than the "
                f"{horizon_rows:,} rows of {length}: the run is longer than its data; set it to {steps}, the steps that"
                " the budgets last, or give one corpus a weight instead, which takes the rest"
            )
        counts = _round_to_largest({name: budget.rows / asked for name, budget in budgets.items()}, PERIOD)
    else:
        counts = {name: int(budget.rows * PERIOD / horizon_rows) for name, budget in budgets.items()}
    for name, budget in budgets.items():
        if counts[name] == 0:
            raise ConfigError(
                f"{budget.text}: {_count(budget.rows)} of the {horizon_rows:,} rows of {length}, which is less than "
                f"1/{PERIOD} and rounds to nothing; ask for {_count(Fraction(horizon_rows, PERIOD))} rows or more, or "
                "leave the corpus out"
            )
    rest = PERIOD - sum(counts.values())
    if any(weights.values()):
        counts |= _share_out_weights(weights, rest, "data.corpora.{}.weight")
    return {name: counts.get(name, 0) for name in data.sources}


def _round_to_largest(shares: Mapping[str, Fraction], period: int) -> dict[str, int]:
    """Whole parts of a period, by the method of the largest remainder; equal remainders by the order of names."""
    counts = {name: int(share * period) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: counts[name] - shares[name] * period)
    for name in by_remainder[: period - sum(counts.values())]:
        counts[name] += 1
    return counts


def _refuse_weight(field: str, weight: Fraction, total: Fraction, period: int) -> None:
    others = total - weight
    remedy = (
        f"use {_round_up(others / (period - 1))} or more, or 0"
        if period > 1
        else "lower the budgets of epochs and tokens, which leave it nothing, or set it to 0"
    )
    raise ConfigError(
        f"{field} = {float(weight):g} is a share of {float(weight / total):.3g} of the {period} in {PERIOD} rows that "
        f"weights share out, and rounds to no row; {remedy}"
    )


def _round_up(value: Fraction) -> str:
    """Three digits of a positive number, not below it."""
    scale = Fraction(10) ** (2 - _exponent(value))
    return f"{float(-(-value * scale // 1) / scale):.3g}"


def _exponent(value: Fraction) -> int:
    return int(f"{float(value):e}".partition("e")[2])


def _count(rows: Fraction) -> str:
    """Rows, for people: with a decimal only where it matters."""
    return f"{int(rows):,}" if rows.denominator == 1 or rows >= 100 else f"{float(rows):.1f}"
