"""Rank arithmetic.

Mutation seen to be caught: the ranks that hold the same experts taken as neighbours.
"""

import doctest
from dataclasses import replace
from math import gcd

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


@given(layouts, st.integers(1, 16))
@settings(deadline=None, max_examples=50)
def test_experts_are_shared_out_among_neighbours_and_every_group_meets_every_other_once(layout, ep):
    ep = gcd(ep, layout.dp * layout.cp)
    layout = replace(layout, ep=ep)
    replicas = layout.groups_along(("dp", "cp"))
    sharing, same = layout.expert_groups(), layout.expert_replica_groups()
    for groups, size in ((sharing, ep), (same, layout.dp * layout.cp // ep)):
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
        assert {len(group) for group in groups} == {size}
        assert all(any(set(group) <= set(ranks) for ranks in replicas) for group in groups)
    for ranks in replicas:
        for first in range(0, len(ranks), ep):
            assert ranks[first : first + ep] in sharing
    for group in sharing:
        meeting = [other for other in same if set(other) & set(group)]
        assert len(meeting) == ep
        assert all(len(set(other) & set(group)) == 1 for other in meeting)


def test_tensor_parallel_ranks_are_neighbours():
    layout = Layout(pp=2, dp=2, cp=1, tp=2)
    assert layout.groups_along(("tp",)) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout.ranks_along(("pp",), 1) == [1, 5]


def test_the_examples_in_the_documentation():
    assert doctest.testmod(layout_module).failed == 0
