"""ZeRO 0 to 3 give the plain PyTorch loop's losses and gradient norms, on any number of replicas.

Mutations seen to be caught (each made the named case fail): gradients not reduced at all (dp 2); `unscale` left out of
`reduce_gradients` (fp16); the gather of updated partitions left out (dp 2, ZeRO-1); the loss divided by each rank's own
token count instead of the global one (dp 2: rows have unequal label counts); clipping by this partition's norm alone
(dp 2, ZeRO-1); the factor dp left out for DeepSpeed's averaging (dp 2, ZeRO-2 and 3).
"""

import json

import pytest

from tests.support.ranks import run_ranks

MODULE = "tests.dist.programs.zero_parity"
FP32_TOLERANCE = 1e-6
LOW_PRECISION_TOLERANCE = {"bf16": (4e-3, 1.5e-2), "fp16": (5e-4, 3e-3)}
"""(loss, gradient norm) against the fp32 loop. bf16 keeps 8 bits of a number: 2^-8 = 4e-3 of a loss of about 4 nats
would be 1.6e-2; fp16 keeps 11 bits, an eighth of that. The bounds are about 4 times what was seen on this model."""


def run_cases(world_size: int, cases: list[dict], folder) -> list[dict]:
    lines = run_ranks(MODULE, world_size, [json.dumps(cases)], folder)[0].splitlines()
    results = [json.loads(line) for line in lines]
    assert len(results) == len(cases)
    assert all(result["min_norm"] > 0.5 for result in results), "clipping must be active in every step"
    return results


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_fp32_matches_the_plain_loop(dp, tmp_path):
    cases = [
        {"zero_stage": stage, "dtype": "fp32", "micro_batch_size": micro_batch_size}
        for stage in (0, 1, 2, 3)
        for micro_batch_size in {8 // dp, max(1, 8 // dp // 2)}
    ]
    for result in run_cases(dp, cases, tmp_path):
        assert result["loss_gap"] <= FP32_TOLERANCE, result
        assert result["norm_gap"] <= FP32_TOLERANCE, result


def test_recompute_changes_nothing(tmp_path):
    cases = [
        {"zero_stage": stage, "dtype": "fp32", "micro_batch_size": 2, "recompute": mode}
        for stage, mode in [(1, "full"), (1, "selective"), (3, "full"), (3, "selective")]
    ]
    for result in run_cases(2, cases, tmp_path):
        assert result["loss_gap"] <= FP32_TOLERANCE, result
        assert result["norm_gap"] <= FP32_TOLERANCE, result


def test_low_precision_stays_near_fp32(tmp_path):
    cases = [
        {"zero_stage": stage, "dtype": dtype, "micro_batch_size": 2} for dtype in ("bf16", "fp16") for stage in range(4)
    ]
    for result in run_cases(2, cases, tmp_path):
        loss_tolerance, norm_tolerance = LOW_PRECISION_TOLERANCE[result["dtype"]]
        assert result["loss_gap"] <= loss_tolerance, result
        assert result["norm_gap"] <= norm_tolerance, result
