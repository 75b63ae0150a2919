"""Applying retention to a run that isn't at work, for instance with a stricter rule than it was trained with."""

from dataclasses import dataclass, replace
from pathlib import Path

from megascale.checkpoint.find import DamagedCheckpointError, verify_checkpoint
from megascale.checkpoint.inspect import CheckpointSummary, Remnant, list_checkpoints
from megascale.checkpoint.lease import RunLease, check_claim
from megascale.checkpoint.retention import Kept, Retention, reasons_to_keep
from megascale.checkpoint.run_file import RUN_FILE, peek_run_store, read_run_file
from megascale.checkpoint.store import Store, is_url
from megascale.errors import CheckpointError


@dataclass(frozen=True)
class PrunePlan:
    """What goes and what stays.

    Attributes:
        policy: that was applied.
        kept: steps that stay, each with the reasons.
        deleted: checkpoints that go, oldest first.
        passed_over: damaged ones and those of other runs: they neither count nor go.
        leftovers: of killed saves and deletions; they go too.
    """

    policy: Retention
    kept: dict[int, tuple[str, ...]]
    deleted: tuple[CheckpointSummary, ...]
    passed_over: tuple[CheckpointSummary, ...]
    leftovers: tuple[Remnant, ...]

    @property
    def freed_bytes(self) -> int:
        """Size of all that goes."""
        return sum(summary.bytes for summary in self.deleted) + sum(left.bytes for left in self.leftovers)


def plan_pruning(folder: Path | str, *, last: int | None, every_steps: int | None, best: int | None) -> PrunePlan:
    """What pruning a run folder would delete; nothing is changed.

    Args:
        last, every_steps, best: as in `Retention`; None for what the run's newest checkpoint was trained with.

    Raises:
        CheckpointError: there is no run, no checkpoint, or no rule.
    """
    store, run_id = _open_run(folder)
    listing = list_checkpoints(store)
    usable = [one for one in listing.checkpoints if one.problem is None and one.run_id == run_id]
    if not usable:
        raise CheckpointError(f"{store.place}: holds no checkpoint of this run that could be kept")
    if listing.policy is None and last is None:
        raise CheckpointError(f"{store.place}: its config has no rule for what to keep; give --keep-last")
    asked = {"last": last, "every_steps": every_steps, "best": best}
    policy = replace(
        listing.policy or Retention(1), **{name: value for name, value in asked.items() if value is not None}
    )
    reasons = reasons_to_keep([Kept(one.step, one.validation_loss) for one in usable], policy)
    return PrunePlan(
        policy=policy,
        kept={step: why for step, why in reasons.items() if why},
        deleted=tuple(one for one in usable if not reasons[one.step]),
        passed_over=tuple(one for one in listing.checkpoints if one not in usable),
        leftovers=tuple(remnant for remnant in listing.remnants if remnant.reason is None),
    )


def prune(folder: Path | str, *, last: int | None, every_steps: int | None, best: int | None) -> PrunePlan:
    """Deletes what the rule doesn't keep, holding the run folder. The newest is read whole first, and always stays.

    Raises:
        CheckpointError: a job is at work on the run, or the newest checkpoint is damaged; nothing was deleted.

    Cost: reads the newest checkpoint once.
    """
    store, run_id = _open_run(folder)
    with RunLease.take(Path(folder)) as lease:
        plan = plan_pruning(folder, last=last, every_steps=every_steps, best=best)
        _check_newest(store, run_id)
        for summary in plan.deleted:
            check_claim(lease.claim)
            store.delete(summary.step)
        store.prepare("")  # what killed jobs left
    return plan


def _open_run(folder: Path | str) -> tuple[Store, str]:
    if is_url(str(folder)):
        raise CheckpointError(f"{folder}: give the run folder instead, whose {RUN_FILE} names this place; only there"
                              " can be seen that no job is at work on the run")
    return peek_run_store(Path(folder)), read_run_file(Path(folder)).run_id


def _check_newest(store: Store, run_id: str) -> None:
    newest = max(store.steps())
    try:
        verify_checkpoint(store, newest, run_id=run_id)
    except DamagedCheckpointError as damage:
        raise CheckpointError(
            f"nothing was deleted, because the newest checkpoint can't be used: {damage}\nResume the run, which puts it"
            " into quarantine, or move it away, and prune then"
        ) from None
