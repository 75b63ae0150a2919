"""One rank's tensors as a safetensors file: written as a stream, read slice by slice.

A safetensors file is an 8-byte little-endian length, a JSON header of that length that gives each entry's dtype, shape
and byte range, and then the bytes of the entries. Source: https://github.com/huggingface/safetensors, "Format".
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megascale.checkpoint.index import BYTES_PER_ELEMENT, DTYPE, SliceRecord
from megascale.engine.base import StatePiece
from megascale.errors import CheckpointError
from megascale.parallel.boxes import intersect_boxes

HEADER_ALIGNMENT = 8


def entry_name(piece: StatePiece) -> str:
    """Name of a piece within its file: the key, and which part of the tensor it is, as Python would index it."""
    parts = ", ".join(f"{start}:{stop}" for start, stop in zip(piece.box.starts, piece.box.stops, strict=True))
    return f"{piece.key}[{parts}]"


def encode_header(pieces: Sequence[StatePiece]) -> bytes:
    """The length and header of a file that holds these pieces one after the other."""
    header, position = {}, 0
    for piece in pieces:
        stop = position + piece.box.numel * BYTES_PER_ELEMENT
        header[entry_name(piece)] = {"dtype": DTYPE, "shape": piece.box.shape, "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def encode_pieces(pieces: Sequence[StatePiece]) -> Iterator[bytes | memoryview]:
    """The bytes of a file that holds these pieces. Host memory: one piece of a GPU tensor at a time, none on CPU."""
    if sys.byteorder != "little":
        raise CheckpointError("checkpoints can only be written on little-endian machines; this one is big-endian")
    yield encode_header(pieces)
    for piece in pieces:
        yield piece.tensor.detach().cpu().numpy().data


def read_parts(path: Path, parts: Sequence[tuple[SliceRecord, StatePiece]]) -> None:
    """Copies from one file what each piece shares with the slice beside it, reading only that.

    Raises:
        CheckpointError: not a safetensors file, or its entries aren't what the index says.
    """
    try:
        with safe_open(path, framework="pt") as file:
            for part, piece in parts:
                _copy_common(file.get_slice(part.entry), part, piece)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not the safetensors file that the index describes: {error}") from None


def _copy_common(stored, part: SliceRecord, piece: StatePiece) -> None:
    if (stored.get_dtype(), tuple(stored.get_shape())) != (DTYPE, part.box.shape):
        raise SafetensorError(
            f"entry {part.entry} is {stored.get_dtype()} {stored.get_shape()}, not {DTYPE} {list(part.box.shape)}"
        )
    common = intersect_boxes(part.box, piece.box)
    with torch.no_grad():
        target = piece.tensor.view(piece.box.shape)[common.slices_within(piece.box)]
        target.copy_(stored[common.slices_within(part.box)])
