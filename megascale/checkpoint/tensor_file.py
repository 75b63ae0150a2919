"""Reading parts of tensors from one safetensors file, slice by slice. Nothing in the file is trusted."""

import json
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from megascale.checkpoint.index import BYTES_PER_ELEMENT, DTYPE, MAX_JSON_BYTES, SliceRecord
from megascale.checkpoint.store import Content
from megascale.errors import CheckpointError
from megascale.parallel.boxes import Box, intersect_boxes

if TYPE_CHECKING:  # which brings torch along; tools that only read checkpoints do without
    from megascale.engine.base import StatePiece

LENGTH_BYTES = 8


class HeaderError(ValueError):
    """A header that isn't what the index says."""


def read_parts(content: Content, place: str, parts: "Sequence[tuple[SliceRecord, StatePiece]]") -> None:
    """Copies from one file what each piece shares with the slice beside it.

    Cost: of a mapped file the pages that are wanted; of a fetched one the bytes from the first that is wanted of a
    slice to the last.

    Raises:
        CheckpointError: not a safetensors file, or its entries aren't what the index says.
    """
    try:
        header, first = read_header(content)
        for part, piece in parts:
            common = intersect_boxes(part.box, piece.box)
            stored = read_box(content, first + entry_offset(header, part, content.size_bytes - first), part.box, common)
            target = piece.tensor.detach().view(piece.box.shape)[common.slices_within(piece.box)]
            if target.is_cpu:
                np.copyto(target.numpy(), stored)
            else:
                import torch

                target.copy_(torch.from_numpy(stored.copy()))
    except HeaderError as error:
        raise CheckpointError(f"{place}: not the safetensors file that the index describes: {error}") from None


def read_header(content: Content) -> tuple[dict, int]:
    """The header of a safetensors file, and where its entries begin.

    Raises:
        HeaderError: it is none.
    """
    length = int.from_bytes(content.read(0, LENGTH_BYTES), "little")
    if content.size_bytes < LENGTH_BYTES or length > min(MAX_JSON_BYTES, content.size_bytes - LENGTH_BYTES):
        raise HeaderError(f"a header of {length} bytes in a file of {content.size_bytes}")
    try:
        header = json.loads(bytes(content.read(LENGTH_BYTES, LENGTH_BYTES + length)))
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"its header is no JSON: {error}") from None
    if not isinstance(header, dict):
        raise HeaderError("its header is no object")
    return header, LENGTH_BYTES + length


def read_box(content: Content, start: int, outer: Box, inner: Box) -> np.ndarray:
    """The elements of a box within a larger one that is stored row-major from byte `start` on, without a copy."""
    strides = [prod(outer.shape[dim + 1:]) for dim in range(len(outer.shape))]
    firsts = [a - b for a, b in zip(inner.starts, outer.starts, strict=True)]
    first = sum(offset * stride for offset, stride in zip(firsts, strides, strict=True))
    last = first + sum((size - 1) * stride for size, stride in zip(inner.shape, strides, strict=True))
    view = content.read(start + first * BYTES_PER_ELEMENT, start + (last + 1) * BYTES_PER_ELEMENT)
    if start % BYTES_PER_ELEMENT:
        view = memoryview(bytes(view))  # only files of strangers are not aligned
    flat = np.frombuffer(view, "<f4")
    return np.lib.stride_tricks.as_strided(flat, inner.shape, [s * BYTES_PER_ELEMENT for s in strides])


def entry_offset(header: dict, part: SliceRecord, data_bytes: int) -> int:
    """Where an entry begins, relative to the first; checked against what the index says of it.

    Raises:
        HeaderError: it isn't what the index says.
    """
    entry = header.get(part.entry)
    wanted = {"dtype": DTYPE, "shape": list(part.box.shape)}
    if not isinstance(entry, dict) or {name: entry.get(name) for name in wanted} != wanted:
        raise HeaderError(f"entry {part.entry} is {entry}, not {wanted}")
    ends = entry.get("data_offsets")
    if not (isinstance(ends, list) and len(ends) == 2 and all(type(end) is int for end in ends)
            and 0 <= ends[0] <= ends[1] <= data_bytes and ends[1] - ends[0] == part.box.numel * BYTES_PER_ELEMENT):
        raise HeaderError(f"entry {part.entry} has the data_offsets {ends} of {data_bytes} bytes")
    return ends[0]
