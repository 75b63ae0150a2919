"""Filling tensors from a checkpoint, whatever layout wrote it and whatever layout reads it."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import prod

from megascale.checkpoint.comm import Comm, run_together
from megascale.checkpoint.digest import MODULUS, digest_box
from megascale.checkpoint.find import VerifiedCheckpoint
from megascale.checkpoint.index import SliceRecord
from megascale.checkpoint.tensor_file import read_parts
from megascale.engine.base import StatePiece
from megascale.errors import CheckpointError
from megascale.parallel.boxes import intersect_boxes

NAMES_SHOWN = 5


def load_pieces(checkpoint: VerifiedCheckpoint, pieces: Iterable[StatePiece], *, comm: Comm) -> None:
    """Fills the tensor of each piece from whichever files hold parts of its box, and checks that the bits are there.

    Every rank calls it. The layout that wrote the checkpoint doesn't matter, nor how many ranks it had.

    Raises:
        CheckpointError: on every rank: a tensor that the checkpoint lacks, has in another shape, or has too much; or
            one whose elements in memory, over all ranks, aren't those that were saved.

    Cost: each rank reads the bytes of its own pieces once, and digests those that it owns (0.5 GB/s a core).
    """
    pieces = list(pieces)
    run_together(comm, lambda: _check_keys(checkpoint, pieces))
    _check_nothing_left(checkpoint, pieces, comm)
    run_together(comm, lambda: fill_pieces(checkpoint, pieces))
    _check_digests(checkpoint, pieces, comm)


def fill_pieces(checkpoint: VerifiedCheckpoint, pieces: Sequence[StatePiece]) -> None:
    """Fills the tensor of each piece, with no word to other ranks: for tools that need weights without an engine.

    Cost: reads the bytes of the pieces once.
    """
    parts_of_file: dict[str, list[tuple[SliceRecord, StatePiece]]] = defaultdict(list)
    for piece in pieces:
        for part in checkpoint.index.tensors[piece.key].slices:
            if intersect_boxes(part.box, piece.box):
                parts_of_file[part.file].append((part, piece))
    for name, parts in parts_of_file.items():
        with checkpoint.store.open(checkpoint.step, name) as content:
            read_parts(content, f"{checkpoint.path}/{name}", parts)


def _check_digests(checkpoint: VerifiedCheckpoint, pieces: Sequence[StatePiece], comm: Comm) -> None:
    """Compares what is in memory now, over all ranks, with what was saved, tensor by tensor."""
    keys = sorted(checkpoint.index.tensors)
    sums = dict.fromkeys(keys, 0)
    for piece in pieces:
        if piece.is_owner:
            sums[piece.key] += digest_box(piece.tensor.detach().cpu().numpy(), piece.global_shape, piece.box)
    totals = comm.control_sum([_signed(sums[key] % MODULUS) for key in keys])
    wrong = [key for key, total in zip(keys, totals, strict=True)
             if f"{total % MODULUS:016x}" != checkpoint.index.tensors[key].digest]
    if wrong:
        raise CheckpointError(f"{checkpoint.path}: {_name_some(wrong)} in memory after loading isn't what was saved")


def _signed(value: int) -> int:
    return value - MODULUS if value >= MODULUS // 2 else value


def _check_keys(checkpoint: VerifiedCheckpoint, pieces: Sequence[StatePiece]) -> None:
    tensors = checkpoint.index.tensors
    missing = sorted({piece.key for piece in pieces if piece.key not in tensors})
    if missing:
        raise CheckpointError(f"{checkpoint.path}: lacks {_name_some(missing)}, which this model and optimizer have")
    for piece in pieces:
        if tensors[piece.key].shape != tuple(piece.global_shape):
            raise CheckpointError(
                f"{checkpoint.path}: {piece.key} has shape {list(tensors[piece.key].shape)},"
                f" in this model it is {list(piece.global_shape)}"
            )


def _check_nothing_left(checkpoint: VerifiedCheckpoint, pieces: Sequence[StatePiece], comm: Comm) -> None:
    """Refuses tensors that no rank wants. Owned boxes cover each wanted tensor once, so counting elements is enough."""
    tensors = checkpoint.index.tensors
    wanted = sum(comm.control_gather(sum(piece.box.numel for piece in pieces if piece.is_owner)))
    if wanted == sum(prod(record.shape) for record in tensors.values()):
        return
    mine = {piece.key for piece in pieces}
    extra = [key for key in sorted(tensors) if not any(comm.control_gather(int(key in mine)))]
    raise CheckpointError(
        f"{checkpoint.path}: holds {_name_some(extra)}, which this model and optimizer don't have" if extra
        else f"{checkpoint.path}: the owned pieces of all ranks don't cover this model exactly once"
    )


def _name_some(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - NAMES_SHOWN} more" if len(keys) > NAMES_SHOWN else ""
    return ", ".join(keys[:NAMES_SHOWN]) + more
