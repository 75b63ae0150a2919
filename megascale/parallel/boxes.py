"""Rectangular parts of a tensor: how a flat range of a sharded optimizer is named by global coordinates.

A *box* is one half-open interval per dim. ZeRO cuts a flattened tensor anywhere, so what a rank holds is a flat
range [start, stop); in global coordinates that is a short list of boxes. Checkpoints speak boxes only, which is why
any layout can read what any other layout wrote.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from math import prod


@dataclass(frozen=True)
class Box:
    """A rectangular part of a tensor: `starts[d] <= index[d] < stops[d]` for each dim d."""

    starts: tuple[int, ...]
    stops: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in zip(self.starts, self.stops, strict=True))

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index of this box into the whole tensor."""
        return tuple(slice(start, stop) for start, stop in zip(self.starts, self.stops, strict=True))

    def slices_within(self, outer: "Box") -> tuple[slice, ...]:
        """Index of this box into a tensor that holds `outer`, which contains it."""
        return tuple(slice(a - o, b - o) for a, b, o in zip(self.starts, self.stops, outer.starts, strict=True))


def whole_box(shape: tuple[int, ...]) -> Box:
    """The box that covers a tensor of this shape."""
    return Box((0,) * len(shape), tuple(shape))


def intersect_boxes(a: Box, b: Box) -> Box | None:
    """The common part of two boxes of one tensor, or None where they don't meet."""
    starts = tuple(max(x, y) for x, y in zip(a.starts, b.starts, strict=True))
    stops = tuple(min(x, y) for x, y in zip(a.stops, b.stops, strict=True))
    if any(start >= stop for start, stop in zip(starts, stops, strict=True)):
        return None
    return Box(starts, stops)


def boxes_of_flat_range(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """Cuts the flat range [start, stop) of a row-major tensor into boxes, in flat order.

    Each box is contiguous in the flattened tensor, so the boxes laid end to end are the range itself. A tensor of n
    dims gives at most 2n - 1 boxes (3 for a matrix: the end of a row, whole rows, the beginning of a row).
    """
    if start >= stop:
        return []
    if not shape:
        return [Box((), ())]
    inner = prod(shape[1:])
    first_row, last_row = start // inner, (stop - 1) // inner
    if first_row == last_row:
        return [
            Box((first_row, *box.starts), (first_row + 1, *box.stops))
            for box in boxes_of_flat_range(shape[1:], start - first_row * inner, stop - first_row * inner)
        ]
    head_stop = start if start % inner == 0 else (first_row + 1) * inner
    tail_start = stop - stop % inner
    boxes = boxes_of_flat_range(shape, start, head_stop)
    if head_stop < tail_start:
        rows = (head_stop // inner, tail_start // inner)
        boxes.append(Box((rows[0], *(0,) * (len(shape) - 1)), (rows[1], *shape[1:])))
    return boxes + boxes_of_flat_range(shape, tail_start, stop)


def tiles_exactly(boxes: Iterable[Box], shape: tuple[int, ...]) -> bool:
    """Whether the boxes, none of them empty, cover every element of a tensor of this shape exactly once.

    Sums up each box's corners with alternating signs and compares with the whole tensor's. The signed corners are the
    mixed difference of the function "how many boxes cover this element", and that difference determines the function,
    so the answer is exact: gaps, overlaps and boxes outside the tensor all leave corners over.

    Cost: 2^n dictionary updates a box for n dims, however many boxes there are.
    """
    corners: Counter[tuple[int, ...]] = Counter()
    for box in boxes:
        _add_corners(corners, box, 1)
    _add_corners(corners, whole_box(shape), -1)
    return not any(corners.values())


def _add_corners(corners: Counter[tuple[int, ...]], box: Box, weight: int) -> None:
    for sides in product((0, 1), repeat=len(box.starts)):
        corner = tuple(box.stops[dim] if side else box.starts[dim] for dim, side in enumerate(sides))
        corners[corner] += weight * (-1) ** sum(sides)
