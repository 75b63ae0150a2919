"""Writing a checkpoint, all ranks together: afterwards either a whole new one exists, or the earlier ones alone do.

Each rank writes its own file under a temporary name and leaves an acknowledgement beside it, both on disk before it
says so. When all have, rank 0 writes the index, puts it on disk, and renames the folder: that rename is the commit.
Older checkpoints are deleted only after it is on disk.
"""

import secrets
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megascale.checkpoint.comm import Comm, ask_rank_zero, run_on_rank_zero, run_together
from megascale.checkpoint.files import FileRecord, free_bytes, move_durably, read_bounded, sync_folder, write_durably
from megascale.checkpoint.folders import (
    CHECKPOINTS,
    checkpoint_path,
    delete_older,
    list_steps,
    remove_leftovers,
    temporary_path,
)
from megascale.checkpoint.index import (
    BYTES_PER_ELEMENT,
    DTYPE,
    FORMAT_NAME,
    FORMAT_VERSION,
    INDEX_NAME,
    MAX_JSON_BYTES,
    SUMS_NAME,
    CheckpointIndex,
    RunRecord,
    hash_list,
)
from megascale.checkpoint.records import parse_record, to_json
from megascale.checkpoint.state import RunState
from megascale.checkpoint.tensor_file import encode_header, encode_pieces, entry_name
from megascale.engine.base import StatePiece
from megascale.errors import CheckpointError, LeaseLostError, NonFiniteError, SaveError

MIB = 1 << 20
SPARE_BYTES_PER_RANK = MIB
"""Room asked for beyond the tensors, for the acknowledgement and this rank's share of the index."""


@dataclass(frozen=True)
class WrittenSlice:
    """One piece that a rank wrote, as its acknowledgement lists it."""

    key: str
    shape: tuple[int, ...]
    entry: str
    starts: tuple[int, ...]
    stops: tuple[int, ...]


@dataclass(frozen=True)
class Acknowledgement:
    """What one rank has put on disk."""

    file: str
    record: FileRecord
    slices: tuple[WrittenSlice, ...]


def save_checkpoint(
    run_folder: Path,
    run: RunRecord,
    state: RunState,
    pieces: Iterable[StatePiece],
    *,
    comm: Comm,
    keep_last: int,
    check_lease: Callable[[], None] = lambda: None,
) -> Path:
    """Saves the run as `checkpoints/step_<step>` and keeps the newest `keep_last`. Every rank calls it.

    Args:
        run_folder: on a file system that all ranks share.
        pieces: the state that lives on this rank; only owned pieces are written.
        check_lease: called on rank 0 first and right before the commit; raises if another job took the run folder.

    Returns:
        The folder of the checkpoint. A checkpoint of this step that exists already is left as it is.

    Raises:
        NonFiniteError: a value to be saved is NaN or infinite; nothing was written.
        SaveError: the checkpoint couldn't be written on some rank. The earlier ones are untouched, and all ranks
            raise this together.
        LeaseLostError: another job has taken the run folder; on rank 0, while the others raise SaveError.

    Cost: each rank reads its owned state once to check it and once to write and hash it; a dozen gathers of one number.
    """
    run_folder = Path(run_folder)
    owned = [piece for piece in pieces if piece.is_owner]
    _check_finite(owned, state.step, comm)
    final = checkpoint_path(run_folder, state.step)
    if ask_rank_zero(comm, lambda: state.step in list_steps(run_folder)):
        return final
    temporary = temporary_path(run_folder, state.step, ask_rank_zero(comm, lambda: secrets.randbelow(1 << 62)))
    needed_bytes = sum(comm.control_gather(_file_bytes(owned) + SPARE_BYTES_PER_RANK))
    try:
        run_on_rank_zero(comm, lambda: _prepare(run_folder, temporary, needed_bytes, check_lease))
        run_together(comm, lambda: _write_rank(temporary, comm.rank, owned))
        run_on_rank_zero(comm, lambda: _commit(temporary, final, run, state, comm.world_size, check_lease))
    except CheckpointError as error:
        if comm.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, LeaseLostError):
            raise
        raise SaveError(_explain(final, needed_bytes, error)) from error
    run_on_rank_zero(comm, lambda: delete_older(run_folder, state.step, keep_last))
    return final


def _check_finite(owned: Sequence[StatePiece], step: int, comm: Comm) -> None:
    bad_keys = [piece.key for piece in owned if not torch.isfinite(piece.tensor).all()]
    bad_ranks = [rank for rank, count in enumerate(comm.control_gather(len(bad_keys))) if count]
    if bad_ranks:
        named = f"{bad_keys[0]} on this rank" if bad_keys else f"rank {bad_ranks[0]} names the tensor"
        raise NonFiniteError(
            f"step {step} is not saved: NaN or infinite values in the state of ranks {bad_ranks[:8]}: {named};"
            " resume from the last checkpoint"
        )


def _file_bytes(owned: Sequence[StatePiece]) -> int:
    return len(encode_header(owned)) + sum(piece.box.numel for piece in owned) * BYTES_PER_ELEMENT


def _prepare(run_folder: Path, temporary: Path, needed_bytes: int, check_lease: Callable[[], None]) -> None:
    check_lease()  # before anything is removed: it may be another job's by now
    parent = run_folder / CHECKPOINTS
    if not parent.is_dir():
        parent.mkdir(parents=True)
        sync_folder(run_folder)
    remove_leftovers(run_folder)
    if free_bytes(parent) < needed_bytes:
        raise CheckpointError("the disk is too full")
    temporary.mkdir()


def _write_rank(temporary: Path, rank: int, owned: Sequence[StatePiece]) -> None:
    name = f"rank_{rank:05d}.safetensors"
    record = write_durably(temporary / name, encode_pieces(owned))
    slices = tuple(
        WrittenSlice(
            key=piece.key, shape=tuple(piece.global_shape), entry=entry_name(piece),
            starts=piece.box.starts, stops=piece.box.stops,
        )
        for piece in owned
    )
    acknowledgement = Acknowledgement(file=name, record=record, slices=slices)
    write_durably(_acknowledgement_path(temporary, rank), [to_json(asdict(acknowledgement))])
    sync_folder(temporary)


def _commit(
    temporary: Path, final: Path, run: RunRecord, state: RunState, world_size: int, check_lease: Callable[[], None]
) -> None:
    text = _index_text(run, state, [_read_acknowledgement(temporary, rank) for rank in range(world_size)])
    index = parse_record(CheckpointIndex, text, temporary / INDEX_NAME)
    write_durably(temporary / INDEX_NAME, [text])
    write_durably(temporary / SUMS_NAME, [hash_list(index, text)])
    for rank in range(world_size):
        _acknowledgement_path(temporary, rank).unlink()
    sync_folder(temporary)
    check_lease()
    move_durably(temporary, final)


def _index_text(run: RunRecord, state: RunState, acknowledgements: Sequence[Acknowledgement]) -> bytes:
    tensors: dict[str, dict] = {}
    for acknowledged in acknowledgements:
        for part in acknowledged.slices:
            tensor = tensors.setdefault(part.key, {"shape": part.shape, "dtype": DTYPE, "slices": []})
            if tensor["shape"] != part.shape:
                raise CheckpointError(f"ranks disagree on the shape of {part.key}: {tensor['shape']}, {part.shape}")
            place = {"entry": part.entry, "starts": part.starts, "stops": part.stops}
            tensor["slices"].append({"file": acknowledged.file, **place})
    text = to_json({
        "format": FORMAT_NAME,
        "format_version": FORMAT_VERSION,
        "run": asdict(run),
        "state": asdict(state),
        "files": {acknowledged.file: asdict(acknowledged.record) for acknowledged in acknowledgements},
        "tensors": dict(sorted(tensors.items())),
    })
    if len(text) > MAX_JSON_BYTES:
        raise CheckpointError(f"the index takes {len(text)} bytes, more than the {MAX_JSON_BYTES} that are read back")
    return text


def _acknowledgement_path(temporary: Path, rank: int) -> Path:
    return temporary / f"rank_{rank:05d}.acknowledgement.json"


def _read_acknowledgement(temporary: Path, rank: int) -> Acknowledgement:
    path = _acknowledgement_path(temporary, rank)
    text = read_bounded(path, MAX_JSON_BYTES)
    if text is None:
        raise CheckpointError(f"{path}: rank {rank} wrote it, rank 0 can't see it; all ranks must share the folder")
    return parse_record(Acknowledgement, text, path)


def _explain(final: Path, needed_bytes: int, error: CheckpointError) -> str:
    try:
        room = f"{free_bytes(final.parent) / MIB:.1f} MiB are free"
    except OSError as unreadable:
        room = f"free space unknown ({unreadable})"
    return (
        f"{final}: not saved: {error}. It needs {needed_bytes / MIB:.1f} MiB, {room}."
        " The earlier checkpoints are untouched"
    )
