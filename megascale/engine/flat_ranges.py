"""What lies where in a flat parameter group: plain numbers, so that they can be tested without ranks."""

from collections.abc import Sequence
from itertools import accumulate, groupby

from megascale.parallel.axis import Axis
from megascale.parallel.placement import Placement

Range = tuple[int, int]
"""[start, stop) in elements."""


def flat_order(placements: Sequence[Placement], *, counted_first: bool = True) -> list[int]:
    """In which order a group's parameters go into its flat buffer, as places in `placements`.

    Those with whole gradients come first, then those to be summed over one axis side by side, then the next axis: each
    axis is one run, and one collective a step sums it. Norms alone are 2 tensors a layer, so one by one it would be
    hundreds of collectives of a few kilobytes, each of which costs a round trip. Among whole gradients the counted
    ones come first, so that the norm reads few ranges. Otherwise the order stays: it is the same on all ranks of an
    axis, which list the parameters that they share in the same order.

    Args:
        counted_first: as said. What is counted differs over tp ranks; without it the order is the same on all of them.
    """
    axes = list(dict.fromkeys(axis_name(placement) for placement in placements))

    def rank(index: int) -> tuple[int, bool]:
        name = axis_name(placements[index])
        return (1 + axes.index(name), False) if name else (0, counted_first and not placements[index].is_counted)

    return sorted(range(len(placements)), key=rank)


def summed_runs(placements: Sequence[Placement]) -> list[tuple[Axis, Range]]:
    """The ranges of a flat group, laid out in this order, that are to be summed over an axis."""
    located = zip(placements, flat_ranges(placements), strict=True)
    runs = [(name, list(run)) for name, run in groupby(located, key=lambda pair: axis_name(pair[0]))]
    return [(run[0][0].partial_over, (run[0][1][0], run[-1][1][1])) for name, run in runs if name]


def ranges_within(placements: Sequence[Placement], part: Range, *, is_counted: bool) -> list[Range]:
    """Where counted, or uncounted, parameters lie in a part of the flat group, told relative to the part's start."""
    ranges: list[Range] = []
    for placement, (start, stop) in zip(placements, flat_ranges(placements), strict=True):
        start, stop = max(start, part[0]) - part[0], min(stop, part[1]) - part[0]
        if placement.is_counted != is_counted or start >= stop:
            continue
        if ranges and ranges[-1][1] == start:
            start = ranges.pop()[0]
        ranges.append((start, stop))
    return ranges


def flat_ranges(placements: Sequence[Placement]) -> list[Range]:
    """Where each parameter lies in the flat group."""
    stops = list(accumulate(placement.box.numel for placement in placements))
    return list(zip([0, *stops], stops, strict=False))


def axis_name(placement: Placement) -> str:
    """Name of the axis over which the parameter's gradient is to be summed, empty where it is whole."""
    return placement.partial_over.name if placement.partial_over.size > 1 else ""
