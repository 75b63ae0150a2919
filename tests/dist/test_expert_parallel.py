"""Experts shared out over ranks train the plain model, and their checkpoints load in any layout.

The engine's share of it, with given gradients, is in `test_zero_axes.py`.
"""

import json

import pytest

from tests.dist.parity_table import KINDS, TOLERANCE, run_cases
from tests.support.layouts import CASES
from tests.support.ranks import run_ranks

LAYOUTS = ["ep2_dp4", "ep4_capacity", "ep2_tp2_without_sequence_shards", "ep2_pp2", "ep2_cp2_tp2"]
"""The others are in `make parity`, and some like them in `test_moe.py`."""
RESUMED = {
    "ep2_dp4": ["ep2_dp4", "dp4_experts", "ep2_pp2"],
    "dp4_experts": ["ep2_tp2"],
    "ep2_dp4_zero0": ["ep2_cp2_tp2"],
    "ep2_bias": ["ep2_bias", "dp4_bias"],
}


@pytest.fixture(scope="module")
def parity(tmp_path_factory) -> dict[str, dict]:
    """All layouts in one start of the ranks."""
    results = run_cases([CASES[name] for name in LAYOUTS], tmp_path_factory.mktemp("parity"))
    return {result["name"]: result for result in results}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_as_the_plain_loop(layout, parity):
    """Loss, gradient norm and evaluation over 20 steps with clipping, and every element of the state owned once.

    Mutation seen to be caught: rows that came from other ranks not sorted by expert (ep2_cp2_tp2, 6.5e-3).
    """
    result = parity[layout]
    assert result["min_norm"] > 0.5, "clipping must be active in every step"
    assert max(result[kind] for kind in KINDS) <= TOLERANCE, result


def test_a_checkpoint_goes_on_in_any_layout(tmp_path):
    """In its own layout to the bit, in others within rounding; moving biases to the bit in all.

    Mutation seen to be caught: biases loaded into a copy (ep2_bias, 3.9e-5).
    """
    output = run_ranks(
        "tests.dist.programs.expert_checkpoints", 4, [str(tmp_path), json.dumps(RESUMED)], tmp_path, timeout_s=300
    )[0]
    results = [json.loads(line) for line in output.splitlines()]
    assert [(each["source"], each["target"]) for each in results] == [
        (source, target) for source, targets in RESUMED.items() for target in targets
    ]
    for result in results:
        assert result["gap"] <= TOLERANCE, result
        assert result["state_equal"], result
        first, second = result["biases"]
        assert first == second, result
        assert bool(first) == any(map(any, first.values())) == result["source"].endswith("bias"), result
        if result["source"] == result["target"]:
            assert result["outputs_equal"], result
