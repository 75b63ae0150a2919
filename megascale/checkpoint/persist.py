"""The tasks of a save, as one rank carries them out: write, commit, abandon. No torch, and no word to other ranks.

A rank writes its file into the draft and leaves an acknowledgement beside it, both on disk before it says so. When all
have, rank 0 writes the index and commits the draft; only then does it delete what retention no longer keeps.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from megascale.checkpoint.digest import MODULUS, digest_box
from megascale.checkpoint.files import FileRecord
from megascale.checkpoint.index import (
    DTYPE,
    FORMAT_NAME,
    FORMAT_VERSION,
    INDEX_NAME,
    MAX_JSON_BYTES,
    SUMS_NAME,
    CheckpointIndex,
    ProbeRecord,
    RunRecord,
    hash_list,
)
from megascale.checkpoint.lease import LeaseClaim, check_claim
from megascale.checkpoint.pieces import PieceRecord, RankPieces, encode_header
from megascale.checkpoint.records import parse_record, to_json
from megascale.checkpoint.retention import Kept, Retention, plan_deletions
from megascale.checkpoint.state import RunState
from megascale.checkpoint.store import Draft, Store, open_store
from megascale.errors import CheckpointError, NonFiniteError

MIB = 1 << 20
SPARE_BYTES_PER_RANK = MIB
"""Room asked for beyond the tensors, for the acknowledgement and this rank's share of the index."""


@dataclass(frozen=True)
class WriteTask:
    """One rank's part of a save.

    Attributes:
        place: of the store, as `open_store` takes it.
        step: completed steps.
        token: names the save.
        rank: number of the rank.
        read_back: whether what was written is read again and compared.
        needed_bytes: room that all ranks need; None on ranks that don't check it: rank 0 does.
        claim: checked by rank 0 before anything is touched.
    """

    place: str
    step: int
    token: str
    rank: int
    read_back: bool
    needed_bytes: int | None
    claim: LeaseClaim | None


@dataclass(frozen=True)
class CommitTask:
    """What rank 0 does when all ranks have written."""

    place: str
    step: int
    token: str
    world_size: int
    run: RunRecord
    state: RunState
    probe: ProbeRecord | None
    retention: Retention
    claim: LeaseClaim | None


@dataclass(frozen=True)
class AbandonTask:
    """What rank 0 does when a rank has failed."""

    place: str
    step: int
    token: str


@dataclass(frozen=True)
class WrittenSlice:
    """One piece that a rank wrote, as its acknowledgement lists it."""

    piece: PieceRecord
    digest: int


@dataclass(frozen=True)
class Acknowledgement:
    """What one rank has put on disk."""

    file: str
    record: FileRecord
    slices: tuple[WrittenSlice, ...]


def write_part(task: WriteTask, pieces: RankPieces) -> None:
    """Writes one rank's file and its acknowledgement into the draft.

    Raises:
        NonFiniteError: a value to be saved is NaN or infinite.
        LeaseLostError, CheckpointError, OSError: it can't be written.

    Cost: reads the state once to check, digest, hash and write it, and the file once to compare it.
    """
    store = open_store(task.place)
    if task.claim is not None:
        check_claim(task.claim)  # before anything is removed: it may be another job's by now
    if task.needed_bytes is not None:
        store.prepare(task.token)
    draft = store.draft(task.step, task.token)
    if task.needed_bytes is not None:
        free = store.free_bytes()
        if free is not None and free + draft.stored_bytes() < task.needed_bytes:  # others may have begun to write
            raise CheckpointError("the disk is too full")
    name = f"rank_{task.rank:05d}.safetensors"
    digests: list[int] = []
    record = draft.write(name, _encode(pieces, task.step, digests))
    if task.read_back and not draft.is_whole(name, record):
        raise CheckpointError(f"{name}: what was written reads back differently; the disk or its driver is faulty")
    slices = tuple(WrittenSlice(*pair) for pair in zip(pieces.records, digests, strict=True))
    acknowledgement = Acknowledgement(file=name, record=record, slices=slices)
    draft.write(_acknowledgement_name(task.rank), [to_json(asdict(acknowledgement))])
    draft.seal()


def commit(task: CommitTask) -> None:
    """Writes the index, commits the draft, and deletes what retention doesn't keep. A step is committed once.

    Raises:
        LeaseLostError, CheckpointError, OSError: nothing was committed.
    """
    store = open_store(task.place)
    draft = store.draft(task.step, task.token)
    if task.step in store.steps():
        draft.abandon()
        return
    text = _index_text(task, [_read_acknowledgement(draft, rank) for rank in range(task.world_size)])
    index = parse_record(CheckpointIndex, text, f"{store.path(task.step)}/{INDEX_NAME}")
    for rank in range(task.world_size):
        draft.remove(_acknowledgement_name(rank))
    draft.write(SUMS_NAME, [hash_list(index, text)])
    draft.write(INDEX_NAME, [text])
    if task.claim is not None:
        check_claim(task.claim)
    draft.commit()
    with contextlib.suppress(OSError):  # the save is whole; what couldn't be deleted is left to the next one
        retire(store, task.retention)


def abandon(task: AbandonTask) -> None:
    """Removes the draft of a save that failed."""
    with contextlib.suppress(OSError, CheckpointError):
        open_store(task.place).draft(task.step, task.token).abandon()


def retire(store: Store, policy: Retention) -> list[int]:
    """Deletes what the policy doesn't keep, and returns those steps. The newest is known to be whole and is kept."""
    steps = store.steps()
    losses = {step: _validation_loss(store, step) if policy.best else None for step in steps}
    deleted = plan_deletions([Kept(step, losses[step]) for step in steps], policy)
    for step in deleted:
        store.delete(step)
    return deleted


def _encode(pieces: RankPieces, step: int, digests: list[int]) -> Iterator[bytes | memoryview]:
    yield encode_header(pieces.records)
    for record, array in zip(pieces.records, pieces.arrays, strict=True):
        if not np.isfinite(array).all():
            raise NonFiniteError(f"step {step} is not saved: NaN or infinite values in {record.key}")
        digests.append(digest_box(array, record.shape, record.box))
        yield array.data


def _index_text(task: CommitTask, acknowledgements: Sequence[Acknowledgement]) -> bytes:
    tensors: dict[str, dict] = {}
    for acknowledged in acknowledgements:
        for piece, digest in ((part.piece, part.digest) for part in acknowledged.slices):
            tensor = tensors.setdefault(piece.key, {"shape": piece.shape, "dtype": DTYPE, "digest": 0, "slices": []})
            if tensor["shape"] != piece.shape:
                raise CheckpointError(f"ranks disagree on the shape of {piece.key}: {tensor['shape']}, {piece.shape}")
            tensor["digest"] = (tensor["digest"] + digest) % MODULUS
            place = {"entry": piece.entry, "starts": piece.starts, "stops": piece.stops}
            tensor["slices"].append({"file": acknowledged.file, **place})
    text = to_json({
        "format": FORMAT_NAME,
        "format_version": FORMAT_VERSION,
        "run": asdict(task.run),
        "state": asdict(task.state),
        "probe": asdict(task.probe) if task.probe else None,
        "files": {acknowledged.file: asdict(acknowledged.record) for acknowledged in acknowledgements},
        "tensors": {key: tensor | {"digest": f"{tensor['digest']:016x}"} for key, tensor in sorted(tensors.items())},
    })
    if len(text) > MAX_JSON_BYTES:
        raise CheckpointError(f"the index takes {len(text)} bytes, more than the {MAX_JSON_BYTES} that are read back")
    return text


def _acknowledgement_name(rank: int) -> str:
    return f"rank_{rank:05d}.acknowledgement.json"


def _read_acknowledgement(draft: Draft, rank: int) -> Acknowledgement:
    name = _acknowledgement_name(rank)
    text = draft.read_small(name, MAX_JSON_BYTES)
    if text is None:
        raise CheckpointError(f"{name}: rank {rank} wrote it, rank 0 can't see it; all ranks must share the folder")
    return parse_record(Acknowledgement, text, name)


def _validation_loss(store: Store, step: int) -> float | None:
    """The validation loss at a checkpoint's own step; None for one that can't be read: it is only not a best one."""
    try:
        state = json.loads(store.read_small(step, INDEX_NAME, MAX_JSON_BYTES) or b"{}")["state"]
        loss = state["validation_loss"] if state["evaluated_step"] == step else None
        return loss if isinstance(loss, int | float) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
