"""Where things lie in a flat group, and its pieces in global coordinates. No ranks needed.

Mutations seen to be caught:
Two axes in one run; counted ones first within a run (peers would sum different parameters); ranges not told relative to
the part; boxes not shifted to where the part lies; uncounted parts owned.
"""

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megascale.engine.flat_ranges import flat_order, flat_ranges, ranges_within, summed_runs
from megascale.engine.fragments import flat_pieces
from megascale.parallel.axis import Axis
from megascale.parallel.boxes import Box, tiles_exactly
from megascale.parallel.placement import Placement

AXES = (Axis(), Axis(2, 0, None, "tp"), Axis(2, 0, None, "ends"))


@st.composite
def groups(draw) -> list[Placement]:
    sizes = draw(st.lists(st.integers(1, 9), max_size=12))
    return [
        Placement(str(i), (size,), Box((0,), (size,)), draw(st.booleans()), draw(st.sampled_from(AXES)))
        for i, size in enumerate(sizes)
    ]


@given(groups())
def test_one_run_for_each_axis_holds_exactly_its_parameters(group):
    ordered = [group[index] for index in flat_order(group)]
    assert sorted(flat_order(group)) == list(range(len(group)))
    runs = summed_runs(ordered)
    assert len({axis.name for axis, _ in runs}) == len(runs)
    for axis in AXES[1:]:
        located = zip(flat_ranges(ordered), ordered, strict=True)
        wanted = [place for place, placement in located if placement.partial_over == axis]
        found = [(start, stop) for run_axis, (start, stop) in runs if run_axis == axis]
        assert sum(stop - start for start, stop in found) == sum(stop - start for start, stop in wanted)
        assert all(any(a <= start and stop <= b for a, b in found) for start, stop in wanted)


@given(groups())
def test_shared_parameters_keep_their_order(group):
    """Ranks of an axis may hold other parameters beside those that they share; the shared ones stay in order."""
    for axis in AXES[1:]:
        names = [group[index].name for index in flat_order(group) if group[index].partial_over == axis]
        assert names == [placement.name for placement in group if placement.partial_over == axis]


@given(groups(), st.integers(1, 5))
def test_parts_together_count_every_element_once(group, num_parts):
    total = sum(placement.box.numel for placement in group)
    part, counted = -(-total // num_parts), []
    for number in range(num_parts):
        bounds = (number * part, (number + 1) * part)
        for is_counted in (True, False):
            for start, stop in ranges_within(group, bounds, is_counted=is_counted):
                assert 0 <= start < stop <= part
                counted += [(bounds[0] + at, is_counted) for at in range(start, stop)]
    wanted = [
        (at, placement.is_counted)
        for placement, (start, stop) in zip(group, flat_ranges(group), strict=True)
        for at in range(start, stop)
    ]
    assert sorted(counted) == sorted(wanted)


def test_whole_model_is_one_range():
    group = [Placement(str(i), (4,), Box((0,), (4,))) for i in range(5)]
    assert flat_order(group) == [0, 1, 2, 3, 4]
    assert ranges_within(group, (8, 24), is_counted=True) == [(0, 12)]
    assert summed_runs(group) == []


@pytest.mark.parametrize("cuts", [(1, 1), (3, 1), (1, 2), (3, 2)])
def test_pieces_of_all_ranks_tile_the_whole_tensor(cuts):
    """A (6, 8) tensor cut into a grid of parts, each part's flat range shared out over 4 ranks."""
    shape, boxes = (6, 8), []
    size = tuple(length // cut for length, cut in zip(shape, cuts, strict=True))
    whole = torch.arange(prod(shape), dtype=torch.float32).view(shape)
    for row in range(cuts[0]):
        for column in range(cuts[1]):
            starts = (row * size[0], column * size[1])
            box = Box(starts, (starts[0] + size[0], starts[1] + size[1]))
            flat = whole[box.slices].flatten()
            for share in range(4):
                for piece in flat_pieces(Placement("w", shape, box), 0, len(flat), {"master": flat}, share, 4):
                    assert torch.equal(piece.tensor, whole[piece.box.slices].flatten())
                    boxes += [piece.box] if piece.is_owner else []
    assert tiles_exactly(boxes, shape)


def test_uncounted_parts_are_never_owned():
    placement = Placement("w", (4,), Box((0,), (4,)), is_counted=False)
    pieces = list(flat_pieces(placement, 0, 4, {"master": torch.zeros(4)}))
    assert pieces
    assert not any(piece.is_owner for piece in pieces)
