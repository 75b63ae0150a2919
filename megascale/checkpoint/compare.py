"""What changed between a checkpoint and the run that is to go on from it, and whether it may. Pure."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megascale.checkpoint.index import Change, CheckpointIndex, RunRecord
from megascale.config.dump import flat_values
from megascale.config.resume_rules import FIM_KEY, VALIDATION_KEY, ChangeKind, batch_ramp_until, class_of_change
from megascale.data.stream import CorpusRecord, StageRecord, StreamRecord
from megascale.errors import CheckpointError

ABSENT = "absent"
BATCH_KEYS = ("train.global_batch_tokens", "train.batch_ramp")
HORIZON_HINT = "\n(it follows train.max_steps unless it is set; set it to train longer on the schedule as it was)"
BUDGET_HINT = (
    "\n(epochs and tokens of corpora are spread over data.horizon_steps, which follows train.max_steps unless it is"
    " set; set it to train longer on the mixture as it was)"
)
SPLIT_REASON = "its tokens, their order or their tokenizer differ"
MIXTURE_REASON = "a mixture that has begun stays as it is"


@dataclass(frozen=True)
class ClassedChange:
    """A change and what it does to the run.

    Attributes:
        reason: why it is forbidden; empty for the others.
    """

    change: Change
    kind: ChangeKind
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.change}" + (f" ({self.reason})" if self.reason else "")


def find_changes(saved: CheckpointIndex, now: RunRecord, planned_rows: int) -> tuple[ClassedChange, ...]:
    """Everything that differs between a checkpoint and today's run, classed, in order of the keys.

    Args:
        planned_rows: rows that the steps of the checkpoint would have read under today's config.
    """
    found = {
        change.key: ClassedChange(change, *class_of_change(change.key, change.old, change.new))
        for change in changed_values(saved.run.config, now.config)
    }
    others = [
        *_changed_rows(saved.run.stream, now.stream, saved.state.rows),
        *_changed_validation(saved.run.validation, now.validation),
        *_moved_position(saved, planned_rows),
    ]
    classes = (found | {classed.change.key: classed for classed in others}).values()
    return tuple(map(_at_step_zero, classes)) if saved.state.step == 0 else tuple(classes)


def check_changes(changes: Sequence[ClassedChange], allowed: Collection[str], place: object) -> tuple[Change, ...]:
    """Refuses what may not change, or was not allowed to.

    Args:
        allowed: keys whose change is allowed though it changes the math.
        place: of the checkpoint, for the message.

    Returns:
        The changes of the math, all of them allowed: what the lineage of the run has to tell.

    Raises:
        CheckpointError: every other change, with its old and new value and what to do about it.
    """
    forbidden = [classed for classed in changes if classed.kind is ChangeKind.FORBIDDEN]
    maths = [classed for classed in changes if classed.kind is ChangeKind.MATHS]
    missing = [classed for classed in maths if classed.change.key not in allowed]
    if forbidden or missing:
        flags = "".join(f" --allow-change {classed.change.key}" for classed in missing)
        raise CheckpointError(
            f"{place}: the run's checkpoints were computed with another config or corpus:\n"
            + "\n".join(f"  {classed}" for classed in (*forbidden, *missing))
            + _hints(changes, {classed.change.key for classed in (*forbidden, *missing)})
            + (f"\nto go on with what changes the math, noted in the run's lineage, add:{flags}" if flags else "")
            + ("\nwhat is forbidden can't be allowed; `megascale import` takes over the weights alone into a new run"
               if forbidden else "")
            + "\nelse put these back, or give the changed run a folder of its own (run.folder)"
        )
    return tuple(classed.change for classed in maths)


def changed_values(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """The dotted keys whose values differ between two nested dicts, in order of the keys."""
    old, new = flat_values(old), flat_values(new)
    pairs = ((key, old.get(key, ABSENT), new.get(key, ABSENT)) for key in sorted(old.keys() | new.keys()))
    return [Change(*pair) for pair in pairs if pair[1] != pair[2]]


def _at_step_zero(classed: ClassedChange) -> ClassedChange:
    """Of imported weights nothing was computed yet: only what they mean to the model counts."""
    if classed.change.key.startswith("model."):
        return classed
    return ClassedChange(classed.change, ChangeKind.SAFE)


def _hints(changes: Sequence[ClassedChange], refused: Collection[str]) -> str:
    is_longer = any(classed.change.key == "train.max_steps" for classed in changes)
    has_mixture = any(key.startswith("mixture") for key in refused)
    return (HORIZON_HINT if "optimizer.horizon_steps" in refused else "") + (
        BUDGET_HINT if has_mixture and is_longer else "")


def _changed_rows(saved: StreamRecord, now: StreamRecord, rows: int) -> Iterator[ClassedChange]:
    """What would make another stream of the rows that a run has read, the first `rows` of them.

    Mixtures that hadn't begun may differ, and so may corpora that none of the others reads.
    """
    then, today = _begun(saved, rows), _begun(now, rows)
    for first_row in sorted(then.keys() | today.keys()):
        old, new = then.get(first_row, ABSENT), today.get(first_row, ABSENT)
        if old != new:
            change = Change(f"mixture from row {first_row}, of {rows} rows read", old, new)
            yield ClassedChange(change, ChangeKind.FORBIDDEN, MIXTURE_REASON)
    for name in sorted({name for counts in then.values() for name in counts}):
        old, new = saved.corpora.get(name, CorpusRecord(ABSENT, 0.0)), now.corpora.get(name)
        if new is None or old.fingerprint != new.fingerprint:
            change = Change(f"train split of corpus {name}", old.fingerprint, new.fingerprint if new else ABSENT)
            yield ClassedChange(change, ChangeKind.FORBIDDEN, SPLIT_REASON if new else "the run has read of it")
        if new is not None and old.fim_fraction != new.fim_fraction:
            yield ClassedChange(
                Change(FIM_KEY.format(name), old.fim_fraction, new.fim_fraction), ChangeKind.MATHS)


def _changed_validation(saved: dict[str, str], now: dict[str, str]) -> Iterator[ClassedChange]:
    """Validation splits that losses before and after would be of different texts on."""
    for name, fingerprint in saved.items():
        if now.get(name, fingerprint) != fingerprint:
            yield ClassedChange(Change(VALIDATION_KEY.format(name), fingerprint, now[name]), ChangeKind.MATHS)


def _moved_position(saved: CheckpointIndex, planned_rows: int) -> Iterator[ClassedChange]:
    """A batch that would also have changed the steps already taken: the run would read rows again, or pass over some.
    """
    state = saved.state
    if planned_rows != state.rows:
        train = saved.run.config.get("train", {})
        ramp = batch_ramp_until(train, state.step) if {"batch_ramp", "global_batch_tokens"} <= train.keys() else "..."
        change = Change(f"rows read by the first {state.step} steps", state.rows, planned_rows)
        yield ClassedChange(
            change, ChangeKind.FORBIDDEN,
            f"a batch may change from here on, so the config has to tell the batches so far: train.batch_ramp = {ramp}",
        )


def _begun(record: StreamRecord, rows: int) -> dict[int, dict[str, int]]:
    """The mixtures that some of the first rows were read with: rows of each corpus in a period, by their first row."""
    return {stage.first_row: _read(stage) for stage in record.stages if stage.first_row < rows}


def _read(stage: StageRecord) -> dict[str, int]:
    return {name: count for name, count in stage.counts.items() if count}
