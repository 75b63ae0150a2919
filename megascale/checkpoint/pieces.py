"""One rank's part of a checkpoint: which pieces it holds, and the bytes of the safetensors file they make.

A safetensors file is an 8-byte little-endian length, a JSON header of that length that gives each entry's dtype, shape
and byte range, and then the bytes of the entries. Source: https://github.com/huggingface/safetensors, "Format".
"""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megascale.checkpoint.index import BYTES_PER_ELEMENT, DTYPE
from megascale.errors import CheckpointError
from megascale.parallel.boxes import Box

HEADER_ALIGNMENT = 8


@dataclass(frozen=True)
class PieceRecord:
    """A piece without its memory, see `megascale.engine.base.StatePiece`."""

    key: str
    shape: tuple[int, ...]
    starts: tuple[int, ...]
    stops: tuple[int, ...]

    @property
    def box(self) -> Box:
        return Box(self.starts, self.stops)

    @property
    def entry(self) -> str:
        """Name of the piece within its file: the key, and which part of the tensor, as Python would index it."""
        parts = ", ".join(f"{start}:{stop}" for start, stop in zip(self.starts, self.stops, strict=True))
        return f"{self.key}[{parts}]"


@dataclass(frozen=True)
class RankPieces:
    """What one rank writes: its pieces, and their elements in the same order, 1-D fp32 each."""

    records: tuple[PieceRecord, ...]
    arrays: Iterable[np.ndarray]

    def copy_to(self, targets: Iterable[np.ndarray]) -> None:
        """Copies each piece into the array at its place."""
        for target, source in zip(targets, self.arrays, strict=True):
            target[:] = source


def encode_header(records: Sequence[PieceRecord]) -> bytes:
    """The length and header of a file that holds these pieces one after the other."""
    if sys.byteorder != "little":
        raise CheckpointError("checkpoints can only be written on little-endian machines; this one is big-endian")
    header, position = {}, 0
    for record in records:
        stop = position + record.box.numel * BYTES_PER_ELEMENT
        header[record.entry] = {"dtype": DTYPE, "shape": record.box.shape, "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def file_bytes(records: Sequence[PieceRecord]) -> int:
    """Size of the file that holds these pieces."""
    return len(encode_header(records)) + sum(record.box.numel for record in records) * BYTES_PER_ELEMENT
