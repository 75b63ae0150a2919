"""Whether a checkpoint may be continued under today's config and corpus. Pure."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megascale.checkpoint.index import RunRecord
from megascale.config.dump import flat_values
from megascale.errors import CheckpointError

ABSENT = "absent"
HORIZON_HINT = "\n(it follows train.max_steps unless it is set; set it to train longer on the schedule as it was)"


@dataclass(frozen=True)
class Change:
    """One value that differs between a checkpoint and today."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key} = {self.old!r} then, {self.new!r} now"


def changed_values(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """The dotted keys whose values differ between two nested dicts, in order of the keys."""
    old, new = flat_values(old), flat_values(new)
    pairs = ((key, old.get(key, ABSENT), new.get(key, ABSENT)) for key in sorted(old.keys() | new.keys()))
    return [Change(*pair) for pair in pairs if pair[1] != pair[2]]


def check_same_run(saved: RunRecord, now: RunRecord, is_safe: Callable[[str], bool]) -> list[Change]:
    """Refuses to continue a checkpoint under a config or corpus that computes something else.

    Args:
        is_safe: whether a dotted config key may differ, such as `megascale.config.dump.keeps_maths`.

    Returns:
        The changes that are safe, for the log.

    Raises:
        CheckpointError: every other change, with its old and new value.
    """
    changes = changed_values(saved.config, now.config)
    refused = [change for change in changes if not is_safe(change.key)]
    refused += changed_values({"data": saved.data_fingerprints}, {"data": now.data_fingerprints})
    if refused:
        raise CheckpointError(
            "the run's checkpoints were computed with another config or corpus:\n"
            + "\n".join(f"  {change}" for change in refused)
            + (HORIZON_HINT if any(change.key == "optimizer.horizon_steps" for change in refused) else "")
            + "\nput these back, or give the changed run a folder of its own (run.folder)"
        )
    return [change for change in changes if is_safe(change.key)]
