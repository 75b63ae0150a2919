"""Whether a checkpoint may be continued under today's config and corpora. Pure."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megascale.checkpoint.index import CheckpointIndex, RunRecord
from megascale.config.dump import flat_values
from megascale.data.stream import CorpusRecord, StageRecord, StreamRecord
from megascale.errors import CheckpointError

ABSENT = "absent"
HORIZON_HINT = "\n(it follows train.max_steps unless it is set; set it to train longer on the schedule as it was)"
BUDGET_HINT = (
    "\n(epochs and tokens of corpora are spread over data.horizon_steps, which follows train.max_steps unless it is"
    " set; set it to train longer on the mixture as it was)"
)


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


def check_same_run(saved: CheckpointIndex, now: RunRecord, is_safe: Callable[[str], bool]) -> list[Change]:
    """Refuses to continue a checkpoint under a config or corpora that compute something else.

    Args:
        is_safe: whether a dotted config key may differ, such as `megascale.config.dump.keeps_maths`.

    Returns:
        The changes that are safe, for the log.

    Raises:
        CheckpointError: every other change, with its old and new value.
    """
    changes = changed_values(saved.run.config, now.config)
    refused = [change for change in changes if not is_safe(change.key)]
    refused += changed_rows(saved.run.stream, now.stream, saved.state.rows)
    refused += [
        Change(f"validation split of corpus {name}", fingerprint, now.validation[name])
        for name, fingerprint in saved.run.validation.items() if now.validation.get(name, fingerprint) != fingerprint
    ]
    if refused:
        has_horizon = any(change.key == "optimizer.horizon_steps" for change in refused)
        is_longer = any(change.key == "train.max_steps" for change in changes)
        has_mixture = any(change.key.startswith("mixture") for change in refused)
        raise CheckpointError(
            "the run's checkpoints were computed with another config or corpus:\n"
            + "\n".join(f"  {change}" for change in refused)
            + (HORIZON_HINT if has_horizon else "")
            + (BUDGET_HINT if has_mixture and is_longer else "")
            + "\nput these back, or give the changed run a folder of its own (run.folder)"
        )
    return [change for change in changes if is_safe(change.key)]


def changed_rows(saved: StreamRecord, now: StreamRecord, rows: int) -> Iterator[Change]:
    """Yields what would make another stream of the rows that a run has read, the first `rows` of them.

    Mixtures that hadn't begun may differ, and so may corpora that none of the others reads.
    """
    then, today = _begun(saved, rows), _begun(now, rows)
    for first_row in sorted(then.keys() | today.keys()):
        old, new = then.get(first_row, ABSENT), today.get(first_row, ABSENT)
        if old != new:
            yield Change(f"mixture from row {first_row}, of {rows} rows read", old, new)
    for name in sorted({name for counts in then.values() for name in counts}):
        old, new = saved.corpora.get(name, CorpusRecord(ABSENT, 0.0)), now.corpora.get(name)
        if new is None:
            yield Change(f"corpus {name}", old.fingerprint, ABSENT)
            continue
        if old.fingerprint != new.fingerprint:
            yield Change(f"train split of corpus {name}", old.fingerprint, new.fingerprint)
        if old.fim_fraction != new.fim_fraction:
            yield Change(f"fim_fraction of corpus {name}", old.fim_fraction, new.fim_fraction)


def _begun(record: StreamRecord, rows: int) -> dict[int, dict[str, int]]:
    """The mixtures that some of the first rows were read with: rows of each corpus in a period, by their first row."""
    return {stage.first_row: _read(stage) for stage in record.stages if stage.first_row < rows}


def _read(stage: StageRecord) -> dict[str, int]:
    return {name: count for name, count in stage.counts.items() if count}
