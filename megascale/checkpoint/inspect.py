"""What a run's checkpoints are, for people: read beside the run, nothing is moved, removed or locked."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megascale.checkpoint.files import read_bounded
from megascale.checkpoint.find import DamagedCheckpointError, read_stored_index
from megascale.checkpoint.folders import CHECKPOINTS, QUARANTINE, REASON_NAME, is_leftover, list_names
from megascale.checkpoint.index import INDEX_NAME, MAX_JSON_BYTES, SUMS_NAME, CheckpointIndex, parse_index
from megascale.checkpoint.local_store import LocalStore
from megascale.checkpoint.retention import Kept, Retention, reasons_to_keep
from megascale.checkpoint.run_file import RUN_FILE, peek_run_store
from megascale.checkpoint.store import Store, is_url, open_store
from megascale.errors import CheckpointError

MAX_REASON_BYTES = 1 << 16
TRASH = ".trash"
REQUESTS_AT_ONCE = 16
"""For sizes of files: an object store takes its time over each."""


@dataclass(frozen=True)
class CheckpointSummary:
    """One committed checkpoint; what its index would say is None where that can't be read.

    Attributes:
        step: completed steps.
        path: where it is.
        written: when it was written, in seconds since 1970; None where the store doesn't say.
        bytes: of its tensor files.
        num_files: tensor files, one for each rank that wrote it.
        run_id: of the run that it belongs to.
        tokens: label tokens that the parameters were updated with.
        validation_loss: in nats per label token, None where it wasn't evaluated at this very step.
        probe_loss: of the batch that it carries, None where it has none.
        kept: reasons of `megascale.checkpoint.retention`; empty for one that the next save deletes.
        problem: why it can't be used; None where its index is sound and every file has its size.
    """

    step: int
    path: str
    written: float | None
    bytes: int | None
    num_files: int | None
    run_id: str | None
    tokens: int | None
    validation_loss: float | None
    probe_loss: float | None
    kept: tuple[str, ...]
    problem: str | None


@dataclass(frozen=True)
class Remnant:
    """What else lies in a run folder.

    Attributes:
        name: of its folder.
        what: `being written`, `being deleted`, each perhaps left behind by a killed job, or `quarantined`.
        bytes: on disk.
        reason: why it was put into quarantine.
    """

    name: str
    what: str
    bytes: int
    reason: str | None = None


@dataclass(frozen=True)
class Listing:
    """All checkpoints of a run.

    Attributes:
        place: where they lie.
        run_id: as the newest readable one says.
        policy: what is kept, as the newest readable one's config says; None where none does.
        checkpoints: by step, ascending.
        remnants: drafts, deletions, and what is in quarantine. Only known of a run folder.
    """

    place: str
    run_id: str | None
    policy: Retention | None
    checkpoints: tuple[CheckpointSummary, ...]
    remnants: tuple[Remnant, ...]


class CopiedCheckpoint(LocalStore):
    """A store of the one checkpoint in a folder, whatever the folder's name: one that was copied elsewhere."""

    def path(self, step: int) -> Path:
        """See `Store`."""
        return self.run_folder

    def steps(self) -> list[int]:
        """See `Store`. Raises DamagedCheckpointError where its index can't tell."""
        texts = [read_bounded(self.run_folder / name, MAX_JSON_BYTES) for name in (INDEX_NAME, SUMS_NAME)]
        try:
            return [parse_index(*texts, str(self.run_folder)).state.step]
        except CheckpointError as error:
            raise DamagedCheckpointError(error) from None


def open_place(place: str) -> Store:
    """Opens what a person names: a run folder, a folder of one checkpoint, or the url of a run's checkpoints.

    Raises:
        CheckpointError: it is none of these.
    """
    if is_url(place):
        return open_store(place)
    folder = Path(place)
    if (folder / RUN_FILE).exists():
        return peek_run_store(folder)
    if (folder / INDEX_NAME).exists() or (folder / SUMS_NAME).exists():
        return CopiedCheckpoint(folder)
    if (folder / CHECKPOINTS).is_dir():
        return LocalStore(folder)
    raise CheckpointError(
        f"{place}: holds no checkpoints: neither a run folder, which has a {RUN_FILE}, nor a checkpoint's folder, which"
        f" has an {INDEX_NAME}" if folder.is_dir() else f"{place}: no such folder"
    )


def split_step(text: str) -> tuple[str, int | None]:
    """`PLACE@STEP` as its two parts; None for the step where only a place is given."""
    place, at, step = text.rpartition("@")
    return (place, int(step)) if at and place and step.isascii() and step.isdigit() else (text, None)


def choose_step(store: Store, step: int | None) -> int:
    """The step that was asked for, or else the newest.

    Raises:
        CheckpointError: it isn't there; the message says which are.
    """
    steps = store.steps()
    if not steps:
        raise CheckpointError(f"{store.place}: holds no checkpoint")
    if step is not None and step not in steps:
        raise CheckpointError(f"{store.place}: no checkpoint of step {step}; those of steps"
                              f" {', '.join(map(str, steps))} are there")
    return max(steps) if step is None else step


def list_checkpoints(store: Store) -> Listing:
    """Summarizes every checkpoint of a store; ones that retention deletes meanwhile are passed over.

    Cost: reads each index and asks for the size of each file; no tensor is read.
    """
    found: dict[int, CheckpointIndex | str] = {step: _read_index(store, step) for step in store.steps()}
    there = set(store.steps())
    found = {step: index for step, index in found.items() if step in there}
    readable = [index for index in found.values() if isinstance(index, CheckpointIndex)]
    policy = policy_of(readable[-1]) if readable else None
    reasons = reasons_to_keep(candidates(readable), policy) if policy else {}
    summaries = (_summarize(store, step, index, reasons.get(step, ())) for step, index in found.items())
    return Listing(
        place=store.place,
        run_id=readable[-1].run.run_id if readable else None,
        policy=policy,
        checkpoints=tuple(summaries),
        remnants=tuple(_remnants(store.run_folder)) if type(store) is LocalStore else (),
    )


def policy_of(index: CheckpointIndex) -> Retention | None:
    """What a run keeps, as the config in its checkpoint says; None where it doesn't say."""
    section = index.run.config.get("checkpoint")
    names = {"last": "keep_last", "every_steps": "keep_every_steps", "best": "keep_best"}
    values = {to: section.get(name) for to, name in names.items()} if isinstance(section, dict) else {"last": None}
    return Retention(**values) if all(type(value) is int for value in values.values()) else None


def candidates(indices: Iterable[CheckpointIndex]) -> list[Kept]:
    """The checkpoints as retention sees them."""
    return [Kept(index.state.step, own_validation_loss(index)) for index in indices]


def own_validation_loss(index: CheckpointIndex) -> float | None:
    """The validation loss of the saved weights; None where the last evaluation was of earlier ones."""
    return index.state.validation_loss if index.state.evaluated_step == index.state.step else None




def folder_bytes(folder: Path) -> int:
    """Bytes of the files in a folder; what vanishes meanwhile counts as nothing."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except OSError:
                continue
    return total


def _read_index(store: Store, step: int) -> CheckpointIndex | str:
    """The index, or what is wrong with it."""
    try:
        index = read_stored_index(store, step)
    except (CheckpointError, OSError) as error:
        return str(error)
    return index if index.state.step == step else f"{store.path(step)}: is the checkpoint of step {index.state.step}"


def _summarize(
    store: Store, step: int, index: CheckpointIndex | str, kept: tuple[str, ...]
) -> CheckpointSummary:
    place = {"step": step, "path": str(store.path(step)), "written": _written(store, step)}
    if isinstance(index, str):
        unknown = dict.fromkeys(("bytes", "num_files", "run_id", "tokens", "validation_loss", "probe_loss"))
        return CheckpointSummary(**place, **unknown, kept=(), problem=index)
    return CheckpointSummary(
        **place,
        bytes=sum(record.bytes for record in index.files.values()),
        num_files=len(index.files),
        run_id=index.run.run_id,
        tokens=index.state.tokens,
        validation_loss=own_validation_loss(index),
        probe_loss=index.probe.loss if index.probe else None,
        kept=kept,
        problem=_missized(store, step, index),
    )


def _missized(store: Store, step: int, index: CheckpointIndex) -> str | None:
    """The first file that is missing or has another size than the index lists."""
    names = sorted(index.files)
    try:
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            sizes = list(pool.map(lambda name: store.size_bytes(step, name), names))
    except OSError as error:
        return str(error)
    for name, size_bytes in zip(names, sizes, strict=True):
        if size_bytes != index.files[name].bytes:
            found = "missing" if size_bytes is None else f"{size_bytes} bytes"
            return f"{name}: {found}, the index lists {index.files[name].bytes} bytes"
    return None


def _written(store: Store, step: int) -> float | None:
    try:
        return os.stat(store.path(step) / INDEX_NAME).st_mtime if isinstance(store, LocalStore) else None
    except OSError:
        return None


def _remnants(run_folder: Path) -> Iterable[Remnant]:
    for name in sorted(filter(is_leftover, list_names(run_folder / CHECKPOINTS))):
        what = "being deleted" if name.endswith(TRASH) else "being written"
        yield Remnant(name, what, folder_bytes(run_folder / CHECKPOINTS / name))
    for name in sorted(list_names(run_folder / QUARANTINE)):
        folder = run_folder / QUARANTINE / name
        reason = read_bounded(folder / REASON_NAME, MAX_REASON_BYTES) if folder.is_dir() else None
        yield Remnant(name, "quarantined", folder_bytes(folder), (reason or b"").decode(errors="replace").strip())
