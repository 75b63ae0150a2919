"""`--fork RUN@STEP`: a new run that begins with another run's checkpoint. The other run is only read."""

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

from megascale.checkpoint.comm import Comm, ask_rank_zero, run_together
from megascale.checkpoint.find import NO_STEP, DamagedCheckpointError, VerifiedCheckpoint, verify_checkpoint
from megascale.checkpoint.index import LineageRecord
from megascale.checkpoint.run_file import peek_run_store
from megascale.checkpoint.store import Store, is_url, open_store
from megascale.errors import CheckpointError, ConfigError, redact

STEPS_SHOWN = 20


@dataclass(frozen=True)
class ForkSource:
    """Where a new run begins.

    Attributes:
        place: run folder, absolute, or the url of one run's checkpoints.
        step: completed steps of the checkpoint; None takes the newest whole one.
    """

    place: str
    step: int | None

    @property
    def name(self) -> str:
        """The place as lineage and messages tell it."""
        return redact(self.place)


def parse_fork(text: str) -> ForkSource:
    """Reads `RUN` or `RUN@STEP`; a step is digits alone, so other places may have an `@` of their own."""
    run, mark, step = text.rpartition("@")
    run, number = (run, int(step)) if mark and step.isascii() and step.isdigit() else (text, None)
    if not run:
        raise ConfigError(f"--fork {text}: names no run; it is RUN@STEP, such as runs/quickstart@200")
    return ForkSource(run.rstrip("/") if is_url(run) else str(Path(run).resolve()), number)


def check_not_itself(source: ForkSource, run_folder: Path) -> None:
    """Refuses to fork a run into its own folder.

    Raises:
        ConfigError: what to do instead.
    """
    if source.place == str(run_folder.resolve()):
        raise ConfigError(
            f"--fork {source.name}: is this run's own folder; give the new run another one (run.folder=...)"
        )


def check_begun_by(source: ForkSource, own: VerifiedCheckpoint) -> None:
    """A run that has checkpoints goes on from those: right where the fork began it, an oversight where it didn't.

    Raises:
        CheckpointError: the folder holds a run that began otherwise.
    """
    for turn in own.index.run.lineage:
        if turn.kind == "fork" and turn.source == source.name and source.step in (None, turn.step):
            return
    raise CheckpointError(
        f"{own.path}: the run folder holds a run that didn't begin with --fork {source.name}"
        + ("" if source.step is None else f"@{source.step}")
        + "; give the new run another folder (run.folder), or leave --fork out to go on with this one, or add --fresh"
        " to set it aside"
    )


def open_fork(source: ForkSource, own_run_id: str, comm: Comm) -> VerifiedCheckpoint:
    """Verifies the checkpoint that a fork begins with; nothing is moved or removed. Every rank calls it.

    Raises:
        CheckpointError: on every rank: no such run or step, with the steps that are there; damaged; or the run itself
            under another path.

    Cost: reads the checkpoint once, shared out over the ranks.
    """
    store = run_together(comm, lambda: open_store(source.place) if is_url(source.place)
                         else peek_run_store(Path(source.place)))
    found = _newest_whole(source, store, comm)
    if found.index.run.run_id == own_run_id:
        raise CheckpointError(f"{found.path}: is a checkpoint of this very run; give the new run another run.folder")
    return found


def describe_turn(turn: LineageRecord) -> str:
    """One turn of a run's history as a line."""
    changes = "; ".join(map(str, turn.changes))
    words = {"fork": f"forked from {turn.source} at step {turn.step}", "changed": f"changed at step {turn.step}",
             "import": f"weights of {turn.source}"}[turn.kind]
    return f"{words}: {changes}" if changes else words


def _newest_whole(source: ForkSource, store: Store, comm: Comm) -> VerifiedCheckpoint:
    """The step that was asked for, or the newest one that passes."""
    damaged: dict[int, str] = {}
    while (step := ask_rank_zero(comm, lambda: _next_step(source, store, damaged))) != NO_STEP:
        try:
            return verify_checkpoint(store, step, comm=comm)
        except DamagedCheckpointError as damage:
            damaged[step] = str(damage)
    raise CheckpointError(_describe_missing(source, store) + "".join(f"\n  {reason}" for reason in damaged.values()))


def _next_step(source: ForkSource, store: Store, damaged: Container[int]) -> int:
    wanted = (step for step in store.steps() if source.step in (None, step))
    return max((step for step in wanted if step not in damaged), default=NO_STEP)


def _describe_missing(source: ForkSource, store: Store) -> str:
    steps = store.steps()
    asked = "no whole checkpoint" if source.step is None else f"no whole checkpoint of step {source.step}"
    shown = ", ".join(map(str, steps[-STEPS_SHOWN:]))
    return f"--fork {source.name}: {asked}; " + (f"there are those of steps {shown}" if steps else "there is none")
