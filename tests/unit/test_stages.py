"""Stages of a pipeline: cuts, ranks, orders and idle fractions, against brute force and torch's own schedules.

Mutations seen to be caught: a hand split off by one; the sum of squares left out of `split_layers`; V shapes laid out
as loops; `forward_order` stage by stage, or without the stride of V shapes; dualpipe_v's idle units taken for
those of zero_bubble_v; its pairs sent one by one in the simulation; 1f1b's rule left out of the config, and rounds
rounded up.
"""

import logging
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.schedule_trace import build_torch_schedule, torch_actions, unit_boxes
from megascale.config.schedules import SCHEDULES, takes_micro_batches
from megascale.errors import ConfigError
from megascale.parallel.stages import (
    forward_order,
    ideal_idle_fraction,
    plan_stages,
    rank_of_stage,
    split_by_hand,
    split_layers,
    stages_of_rank,
)

LAYOUTS = [
    (schedule, pp, stages_per_rank)
    for schedule, rules in SCHEDULES.items()
    for pp in (2, 3, 4, 8)
    for stages_per_rank in range(rules.min_stages_per_rank, (rules.max_stages_per_rank or 3) + 1)
]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(1, 9))
def test_split_is_the_best_of_all(costs, num_stages):
    if num_stages > len(costs):
        with pytest.raises(ConfigError, match=f"at most {len(costs)} stages"):
            split_layers(costs, num_stages)
        return

    def merit(cuts) -> tuple:
        totals = [sum(costs[start:stop]) for start, stop in pairwise(cuts)]
        return max(totals), sum(total**2 for total in totals), cuts

    every = [(0, *inner, len(costs)) for inner in combinations(range(1, len(costs)), num_stages - 1)]
    best = min(map(merit, every))[2]
    assert split_layers(costs, num_stages) == [range(start, stop) for start, stop in pairwise(best)]


def test_a_dear_head_gets_fewer_blocks():
    costs = [0.1] + [1.0] * 12 + [0.0, 4.0]
    assert [len(stage) for stage in plan_stages(costs, 4)] == [5, 4, 4, 2]


def test_split_by_hand_covers_the_model():
    assert split_by_hand([1, 4, 2], num_layers=10, num_stages=3) == [range(0, 2), range(2, 6), range(6, 10)]
    assert plan_stages([1] * 10, 3, [1, 4, 2]) == split_by_hand([1, 4, 2], 10, 3)


@pytest.mark.parametrize(
    ("blocks", "told"), [([3, 4], "give 3 numbers"), ([3, 0, 4], "one or more"), ([9, 9, 9], "sum")]
)
def test_split_by_hand_refuses(blocks, told):
    with pytest.raises(ConfigError, match=told):
        split_by_hand(blocks, num_layers=10, num_stages=3)


@pytest.mark.parametrize(("schedule", "pp", "stages_per_rank"), LAYOUTS)
def test_ranks_share_out_the_stages(schedule, pp, stages_per_rank):
    owned = [stages_of_rank(schedule, pp, stages_per_rank, rank) for rank in range(pp)]
    assert sorted(stage for own in owned for stage in own) == list(range(pp * stages_per_rank))
    assert all(rank_of_stage(schedule, pp, stage) == rank for rank, own in enumerate(owned) for stage in own)
    assert all(len(own) == stages_per_rank and own == sorted(own) for own in owned)
    if schedule.endswith("_v"):
        assert owned[0] == [0, 2 * pp - 1]


@pytest.mark.parametrize(("schedule", "pp", "stages_per_rank"), LAYOUTS)
@pytest.mark.parametrize("num_micro_batches", [1, 5, 16])
def test_forward_order_keeps_ranks_at_work(schedule, pp, stages_per_rank, num_micro_batches):
    """Unit passes in this order idle for the p - 1 of a pipeline that fills, as long as rounds are full."""
    order = forward_order(schedule, pp, stages_per_rank, num_micro_batches)
    assert sorted(order) == [(s, k) for s in range(pp * stages_per_rank) for k in range(num_micro_batches)]
    free, done, under_way = [0] * pp, {}, set()
    for stage, index in order:
        under_way.add(index)
        assert len(under_way) <= (pp + 1 if schedule.endswith("_v") else 2 * pp)
        if stage == pp * stages_per_rank - 1:
            under_way.remove(index)
        assert stage == 0 or (stage - 1, index) in done
        rank = rank_of_stage(schedule, pp, stage)
        free[rank] = done[stage, index] = max(free[rank], done.get((stage - 1, index), 0)) + 1
    if num_micro_batches % pp == 0 and not schedule.endswith("_v"):
        assert max(free) == stages_per_rank * num_micro_batches + pp - 1
    if schedule.endswith("_v"):
        assert max(free) == 2 * (num_micro_batches - 1) + 2 * pp


@pytest.mark.parametrize(("schedule", "pp", "stages_per_rank"), LAYOUTS)
def test_config_allows_what_torch_runs(schedule, pp, stages_per_rank):
    """The rules of `config.schedules` are those of the installed torch, and each legal number gives a whole step."""
    logging.disable(logging.ERROR)
    legal = []
    for num_micro_batches in range(1, 2 * pp + 6):
        try:
            build_torch_schedule(schedule, pp, stages_per_rank, num_micro_batches)
        except ValueError:
            continue
        finally:
            logging.disable(logging.NOTSET)
        legal.append(num_micro_batches)
    assert legal == [m for m in range(1, 2 * pp + 6) if takes_micro_batches(schedule, pp, stages_per_rank, m)]


@pytest.mark.parametrize(("schedule", "pp", "stages_per_rank"), LAYOUTS)
@pytest.mark.parametrize("rounds", [2, 3])
def test_idle_fraction_is_that_of_torchs_order(schedule, pp, stages_per_rank, rounds):
    """Each rank runs its actions in torch's order as soon as what they need is there, each for one unit."""
    num_micro_batches = rounds * pp
    actions = torch_actions(schedule, pp, stages_per_rank, num_micro_batches)
    boxes = unit_boxes(actions, pp * stages_per_rank)
    end = max(box.end for row in boxes for box in row)
    work = sum(box.end - box.start for box in boxes[0])
    assert work == 3 * stages_per_rank * num_micro_batches
    ideal = ideal_idle_fraction(schedule, pp, stages_per_rank, num_micro_batches)
    assert (end - work) / end == pytest.approx(ideal, abs=1e-12)
