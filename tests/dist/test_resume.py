"""A checkpoint continues to the bit in every ZeRO stage and precision, and within rounding in another stage.

Mutations seen to be caught: gathered parameters not given up after loading (ZeRO-3); the loss scaler not restored
(fp16); parameters not refreshed from the loaded masters (any stage); the padding of ZeRO-3's last partition saved.
"""

import json

import pytest

from tests.support.ranks import run_ranks

MODULE = "tests.dist.programs.resume_parity"


def run_cases(cases: list[dict], folder) -> list[dict]:
    lines = run_ranks(MODULE, 2, [str(folder), json.dumps(cases)], folder)[0].splitlines()
    results = [json.loads(line) for line in lines]
    assert len(results) == len(cases)
    return results


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_resumed_to_the_bit(dtype, tmp_path):
    cases = [{"zero_stage": stage, "dtype": dtype, "resumed_stage": stage} for stage in range(4)]
    for result in run_cases(cases, tmp_path):
        assert result["outputs_equal"], result
        assert result["state_equal"], result
        assert result["scalars_equal"], result
        assert any(result["skipped"]) == (dtype == "fp16"), "the first fp16 steps overflow, so that the scaler moves"


def test_resumed_in_another_stage(tmp_path):
    cases = [
        {"zero_stage": stage, "dtype": "fp32", "resumed_stage": resumed}
        for stage, resumed in [(0, 3), (3, 1), (1, 2), (2, 0)]
    ]
    for result in run_cases(cases, tmp_path):
        assert result["loss_gap"] <= 1e-6, result
        assert result["scalars_equal"], result


def test_offloaded_state_resumed_to_the_bit(tmp_path):
    cases = [{"zero_stage": stage, "dtype": "bf16", "resumed_stage": stage, "offload": "cpu"} for stage in range(4)]
    for result in run_cases(cases, tmp_path):
        assert result["outputs_equal"], result
        assert result["state_equal"], result
