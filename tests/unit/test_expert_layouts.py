"""Which layouts can share out experts, what a rank then holds, and what `check` says of it. No ranks needed.

Mutations seen to be caught: experts counted as if ep didn't cut them; their state as if all replicas shared it out.
"""

import pytest

from megascale.config.derive import derive, describe
from megascale.config.layout_rules import layout_problems, nearest_layouts
from megascale.model.axes import Axes
from megascale.model.memory import state_bytes
from megascale.model.rank_share import RankShare
from megascale.model.transformer import Transformer
from megascale.parallel.axis import ALONE, Axis
from tests.support.layouts import LayoutCase, case_config

REFUSED = [
    ("moe", {"ep": 3}, 12, "parallel.ep = 3 does not divide model.moe.num_experts = 4; use one of 1, 2, 4"),
    ("moe", {"ep": 4, "tp": 2}, 4, "parallel.ep = 4 does not divide dp 2 x cp 1 = 2, the ranks that share out the 4"
     " experts; use one of 1, 2"),
    ("llama", {"ep": 2}, 2, "parallel.ep = 2 with model.family = llama: it has no experts to share out"),
    ("moe", {"ep": 2, "zero_stage": 2}, 2, "parallel.zero_stage = 2 with parallel.ep = 2"),
    ("moe", {"ep": 2, "zero_stage": 3}, 2, "parallel.zero_stage = 3 with parallel.ep = 2"),
]


def config_of(model: str, parallel: dict, **sections):
    return case_config(LayoutCase("experts", 1, parallel, model, **sections))


@pytest.mark.parametrize(("model", "parallel", "ranks", "line"), REFUSED)
def test_an_illegal_degree_is_refused_with_its_numbers(model, parallel, ranks, line):
    assert any(line in problem for problem in layout_problems(config_of(model, parallel), ranks))


def test_the_nearest_layouts_change_ep_where_it_is_at_fault():
    """The nearest keeps tp and halves ep; a proposal is legal, and none of a dense family has ep."""
    config = config_of("moe", {"ep": 4, "tp": 2})
    proposals = nearest_layouts(config, 4)
    assert any((each.tp, each.ep) == (2, 2) for each in proposals)
    assert any((each.tp, each.ep) == (1, 4) for each in proposals)
    for proposal in proposals:
        derive(config.model_copy(update={"parallel": proposal}), 4)
    assert {each.ep for each in nearest_layouts(config_of("llama", {"ep": 2}), 2)} == {1}


def test_check_prints_what_a_rank_has():
    config = config_of("moe", {"ep": 2, "cp": 2})
    lines = dict(describe(config, derive(config, 8)))
    assert lines["expert parallel"] == (
        "each of ep 2 ranks: 4 / 2 = 2 experts of a layer; dp 4 x cp 2 / 2 = 4 ranks hold the same ones"
    )
    assert lines["sharding"] == "ZeRO-1 over dp 4 x cp 2 = 8, of experts over 4"


@pytest.mark.parametrize("parallel", [
    {}, {"ep": 2}, {"ep": 4, "tp": 2}, {"ep": 2, "pp": 2, "stage_layers": [1, 2]}, {"ep": 2, "pp": 2},
])
def test_the_count_of_a_ranks_parameters_is_what_it_holds(parallel):
    config = config_of("moe", parallel, train={"micro_batch_size": 1})
    derived = derive(config, 8)
    axes = Axes(tp=axis(config.parallel.tp, "tp"), ep=axis(config.parallel.ep, "ep"))
    for pp_rank in range(config.parallel.pp):
        share = RankShare(config, derived, 8 // config.parallel.pp * pp_rank)
        model = Transformer(config.model, axes, [share.stage_plan[stage] for stage in share.stages])
        placements = model.placements()
        assert share.parameters.total == sum(parameter.numel() for parameter in placements)
        experts = sum(parameter.numel() for parameter, place in placements.items() if ".experts." in place.name)
        assert share.parameters.experts == experts
        cut_off = sum(parameter.numel() for parameter, place in placements.items() if place.is_expert)
        assert cut_off == (experts if config.parallel.ep > 1 else 0)


def test_expert_state_is_shared_out_over_fewer_ranks():
    """Per expert parameter 8 bytes / (n / ep) in fp32: as many as without ep, times fewer parameters on each rank."""
    plain, cut = (
        RankShare(config, derive(config, 8), 0) for config in (config_of("moe", {}, train={"micro_batch_size": 1}),
                                                               config_of("moe", {"ep": 4},
                                                                         train={"micro_batch_size": 1}))
    )
    assert cut.parameters.experts * 4 == plain.parameters.experts > 0
    assert state_bytes(cut).optimizer == state_bytes(plain).optimizer
    gone = 3 * cut.parameters.experts
    assert state_bytes(cut).gradients == state_bytes(plain).gradients - 4 * gone


def axis(size: int, name: str) -> Axis:
    return ALONE if size == 1 else Axis(size, 0, None, name)
