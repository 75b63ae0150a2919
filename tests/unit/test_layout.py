"""Rank arithmetic."""

import doctest

from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.parallel import layout as layout_module
from megascale.parallel.layout import AXES, Layout

degrees = st.integers(1, 4)
layouts = st.builds(Layout, pp=degrees, dp=degrees, cp=degrees, tp=degrees)


@given(layouts)
@settings(deadline=None, max_examples=50)
def test_coordinates_and_ranks_are_inverse(layout):
    ranks = [layout.rank_at(layout.coordinates(rank)) for rank in range(layout.world_size)]
    assert ranks == list(range(layout.world_size))


@given(layouts, st.sets(st.sampled_from(AXES)))
@settings(deadline=None, max_examples=50)
def test_groups_along_axes_hold_each_rank_once_and_differ_on_those_axes_only(layout, axes):
    groups = layout.groups_along(tuple(axes))
    assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
    for group in groups:
        fixed = [tuple(at for axis, at in layout.coordinates(rank).items() if axis not in axes) for rank in group]
        assert len(set(fixed)) == 1
        assert group == sorted(group)


def test_tensor_parallel_ranks_are_neighbours():
    layout = Layout(pp=2, dp=2, cp=1, tp=2)
    assert layout.groups_along(("tp",)) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout.ranks_along(("pp",), 1) == [1, 5]


def test_the_examples_in_the_documentation():
    assert doctest.testmod(layout_module).failed == 0
