"""Boxes against a plain mask over the flattened tensor."""

from itertools import pairwise
from math import prod

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.parallel.boxes import Box, boxes_of_flat_range, intersect_boxes, tiles_exactly, whole_box

shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def shape_and_range(draw):
    shape = draw(shapes)
    start = draw(st.integers(0, prod(shape)))
    return shape, start, draw(st.integers(start, prod(shape)))


@st.composite
def shape_and_boxes(draw):
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple))
    return shape, draw(st.lists(box_within(shape), max_size=6))


@st.composite
def box_within(draw, shape):
    starts = tuple(draw(st.integers(0, size - 1)) for size in shape)
    stops = tuple(draw(st.integers(start + 1, size)) for start, size in zip(starts, shape, strict=True))
    return Box(starts, stops)


@settings(deadline=None, max_examples=300)
@given(shape_and_range())
def test_boxes_of_a_flat_range_are_that_range_in_order(case):
    shape, start, stop = case
    flat = torch.arange(prod(shape)).view(shape)
    boxes = boxes_of_flat_range(shape, start, stop)
    laid_end_to_end = [index for box in boxes for index in flat[box.slices].reshape(-1).tolist()]
    assert laid_end_to_end == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    assert all(box.numel == prod(box.shape) > 0 for box in boxes)


@settings(deadline=None, max_examples=300)
@given(shape_and_boxes())
def test_tiling_means_that_every_element_is_covered_once(case):
    """Random boxes against counting; dropping the sign of a corner makes it fail."""
    shape, boxes = case
    covered = torch.zeros(shape)
    for box in boxes:
        covered[box.slices] += 1
    assert tiles_exactly(boxes, shape) == bool((covered == 1).all())


@settings(deadline=None, max_examples=200)
@given(shape_and_range(), st.randoms())
def test_a_cut_tensor_is_tiled_and_one_box_less_or_twice_is_not(case, random):
    shape, start, stop = case
    cuts = [boxes_of_flat_range(shape, *bounds) for bounds in ((0, start), (start, stop), (stop, prod(shape)))]
    boxes = [box for boxes in cuts for box in boxes]
    assert tiles_exactly(boxes, shape)
    box = random.choice(boxes)
    assert not tiles_exactly([*boxes, box], shape)
    assert not tiles_exactly([other for other in boxes if other is not box], shape)


def test_boxes_outside_the_tensor_are_no_tiling():
    assert not tiles_exactly([Box((0,), (5,))], (4,))
    assert not tiles_exactly([Box((-1,), (3,))], (4,))
    assert not tiles_exactly([Box((0, 0), (2, 8))], (4, 4))


@settings(deadline=None, max_examples=200)
@given(shape_and_boxes())
def test_the_intersection_indexes_the_same_elements_from_either_box(case):
    shape, boxes = case
    flat = torch.arange(prod(shape)).view(shape)
    for a, b in pairwise(boxes):
        common = intersect_boxes(a, b)
        both = set(flat[a.slices].reshape(-1).tolist()) & set(flat[b.slices].reshape(-1).tolist())
        if common is None:
            assert not both
            continue
        assert set(flat[common.slices].reshape(-1).tolist()) == both
        for outer in (a, b):
            assert torch.equal(flat[outer.slices][common.slices_within(outer)], flat[common.slices])


def test_a_scalar_is_one_box_without_dims():
    assert boxes_of_flat_range((), 0, 1) == [whole_box(())]
    assert intersect_boxes(whole_box(()), whole_box(())) == whole_box(())
    assert tiles_exactly([whole_box(())], ())
