"""What a run's losses and counts are of, which follows from what it learns. Pure."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from megascale.config.families import TRAITS, ObjectiveKind


class Units(NamedTuple):
    """Names for people.

    Attributes:
        loss: the unit of the loss.
        labels: what the loss is a mean over, which is what a run counts as trained on.
        read: what is counted of a corpus.
        worked: what the speed is told in, per second.
    """

    loss: str
    labels: str
    read: str
    worked: str


UNITS: dict[ObjectiveKind, Units] = {
    "causal": Units("nats per token", "tokens", "tokens", "tokens"),
    "mlm": Units("nats per masked token", "masked tokens", "tokens", "tokens"),
    "span": Units("nats per target token", "target tokens", "tokens", "tokens"),
    "pairs": Units("nats per target token", "target tokens", "tokens", "tokens"),
    "classify": Units("nats per image", "images", "bytes", "patches"),
    "mae": Units("squared error per pixel number", "hidden patches", "bytes", "patches"),
}
"""By objective."""


def units_of(config: Mapping[str, Any]) -> Units:
    """Those of a run with this stored config; those of next tokens where it doesn't say what it learns."""
    objective = (config.get("data") or {}).get("objective") or {}
    traits = TRAITS.get((config.get("model") or {}).get("family"))
    kind = objective.get("kind") or (traits.objectives[0] if traits else "causal")
    return UNITS.get(kind, UNITS["causal"])
