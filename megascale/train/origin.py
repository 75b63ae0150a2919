"""Where a session begins: at the run's newest checkpoint, at another run's, or at step 0."""

from dataclasses import dataclass
from pathlib import Path

from megascale.checkpoint.comm import ask_rank_zero
from megascale.checkpoint.compare import ClassedChange, check_changes, find_changes
from megascale.checkpoint.find import VerifiedCheckpoint, find_checkpoint
from megascale.checkpoint.fork import ForkSource, check_begun_by, open_fork
from megascale.checkpoint.index import LineageRecord, RunRecord
from megascale.checkpoint.run_file import read_saved
from megascale.checkpoint.store import Store
from megascale.config.batch_plan import BatchPlan
from megascale.config.resume_rules import ChangeKind
from megascale.errors import CheckpointError, redact
from megascale.observe.console import say
from megascale.parallel.mesh import Mesh


@dataclass(frozen=True)
class Origin:
    """What a session begins with.

    Attributes:
        checkpoint: None at step 0.
        is_fork: whether the checkpoint is another run's.
        lineage: of the run from here on.
        news: the turn that this session is, if it is one.
    """

    checkpoint: VerifiedCheckpoint | None = None
    is_fork: bool = False
    lineage: tuple[LineageRecord, ...] = ()
    news: LineageRecord | None = None

    @property
    def saved_step(self) -> int | None:
        """The step of this run's own newest checkpoint."""
        return self.checkpoint.step if self.checkpoint and not self.is_fork else None


def find_origin(
    store: Store, record: RunRecord, batches: BatchPlan, mesh: Mesh, fork: ForkSource | None, allowed: tuple[str, ...],
) -> Origin:
    """Finds what the run goes on from, and says on rank 0 what changed since. Every rank calls it.

    Args:
        record: of this run, its id included.
        batches: rows of each step under today's config.
        fork: what a run without checkpoints begins with.
        allowed: keys whose change is allowed though it changes the math.

    Raises:
        CheckpointError: nothing whole to go on from, or changes that aren't allowed.
    """
    checkpoint = find_checkpoint(store, run_id=record.run_id, comm=mesh)
    is_fork = checkpoint is None and fork is not None
    if is_fork:
        checkpoint = open_fork(fork, record.run_id, mesh)
    elif fork is not None:
        check_begun_by(fork, checkpoint)
        _say(mesh, f"--fork {fork.name}: obeyed when this run began; it goes on from its own checkpoints")
    if checkpoint is None:
        _check_never_saved(store, Path(record.config["run"]["folder"]), mesh)
        return Origin()
    saved = checkpoint.index
    changes = find_changes(saved, record, batches.first_row(saved.state.step))
    maths = check_changes(changes, allowed, checkpoint.path)
    for classed in changes:
        _say(mesh, f"changed since step {saved.state.step}: {_describe(classed)}")
    if not is_fork and not maths:
        return Origin(checkpoint, is_fork, saved.run.lineage)
    kind, source = ("fork", fork.name) if is_fork else ("changed", record.config["run"]["folder"])
    turn = LineageRecord(kind, saved.state.step, source, saved.run.run_id, maths)
    return Origin(checkpoint, is_fork, (*saved.run.lineage, turn), turn)


def _check_never_saved(store: Store, folder: Path, mesh: Mesh) -> None:
    """Refuses step 0 to a run that has saved: its checkpoints were deleted, or another place is looked at."""
    saved = ask_rank_zero(mesh, lambda: -1 if (step := read_saved(folder)) is None else step)
    if saved >= 0:
        raise CheckpointError(
            f"{store.place}: holds no checkpoint, though this run saved one at step {saved}. Is that place mounted, and"
            " the endpoint the same? Bring the checkpoint back, or start again from step 0 with --fresh"
        )


def _describe(classed: ClassedChange) -> str:
    return f"{classed}{', allowed' if classed.kind is ChangeKind.MATHS else ''}"


def _say(mesh: Mesh, text: str) -> None:
    if mesh.rank == 0:
        say(redact(text))
