"""Which checkpoints are kept, and why. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

LAST, EVERY, BEST = "last", "every", "best"
"""Reasons to keep a checkpoint, as `Retention` names them."""


@dataclass(frozen=True)
class Retention:
    """What is kept.

    Attributes:
        last: so many newest ones, at least one.
        every_steps: those whose step is a multiple of this, for ever; 0 for none.
        best: so many with the lowest validation loss.
    """

    last: int
    every_steps: int = 0
    best: int = 0


@dataclass(frozen=True)
class Kept:
    """A checkpoint that may be kept.

    Attributes:
        step: its step.
        validation_loss: of the model that it holds, None where it wasn't evaluated at this step.
    """

    step: int
    validation_loss: float | None = None


def reasons_to_keep(present: Sequence[Kept], policy: Retention) -> dict[int, tuple[str, ...]]:
    """Why the policy keeps each checkpoint, by step, oldest first; nothing for those that it doesn't keep.

    The newest is always kept. Of two checkpoints with the same validation loss the older one is the better.
    """
    ordered = sorted(present, key=lambda kept: kept.step)
    last = {kept.step for kept in ordered[-max(1, policy.last):]}
    evaluated = [kept for kept in ordered if kept.validation_loss is not None]
    evaluated.sort(key=lambda kept: (kept.validation_loss, kept.step))
    best = {kept.step for kept in evaluated[: policy.best]}
    return {
        kept.step: tuple(reason for reason, applies in (
            (LAST, kept.step in last),
            (EVERY, policy.every_steps and kept.step % policy.every_steps == 0),
            (BEST, kept.step in best),
        ) if applies)
        for kept in ordered
    }


def plan_deletions(present: Sequence[Kept], policy: Retention) -> list[int]:
    """The steps of the checkpoints to delete, oldest first. The newest is never among them."""
    return [step for step, reasons in reasons_to_keep(present, policy).items() if not reasons]
