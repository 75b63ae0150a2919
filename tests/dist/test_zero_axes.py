"""ZeRO 0 to 3 where parameters are parts of global tensors: over tp, cp and a pipeline's two ends.

Mutations seen to be caught:
The plain loop's numbers: DeepSpeed's marks forgotten, or set on all (ZeRO-2, 3); partial gradients not summed (0 to 3);
the norm counting repeated parameters on every tp rank, or summed over the replicas only; dp instead of dp x cp as the
factor for DeepSpeed's averaging; every tp rank giving its evaluation; boxes not shifted; ownership by dp rank under cp
(each element owned twice); offloaded gradients not brought to the host, or masters not copied back.
Bad values: what isn't counted not looked at (0 to 3: the step is taken, and the weights are lost); noted only after the
sum (the fault is then its peers' too).
Expert parallelism, given gradients: experts' summed over all replicas; in ZeRO-0 every replica counted in the norm, or
the norm summed over one replica only; shares of a checkpoint by the rank in the world; expert replicas that are
neighbours, like the ranks that share experts out.
Given gradients: a tied gradient not summed; the reduce-scatter not waiting for that sum; a tied copy owned as well.
"""

import json

import pytest

from tests.support.ranks import run_ranks

NET, GIVEN = "tests.dist.programs.zero_axes", "tests.dist.programs.flat_axes"
FP32_TOLERANCE = 1e-6
NET_ELEMENTS = 6 + 10 * 6 + 6 * 10 + 6


PLAIN = [{"tp": 2, "zero_stage": stage, "dtype": "fp32"} for stage in range(4)]
CONTEXT = [{"tp": 2, "cp": 2, "zero_stage": stage, "dtype": "fp32"} for stage in (1, 3)]
OFFLOADED = [case | {"offload": "cpu"} for case in PLAIN]
POISONED = [
    {"tp": 2, "zero_stage": stage, "dtype": dtype, "poison": [rank, name]}
    for dtype, stage, rank, name in [
        ("fp16", 0, 1, "bias"), ("fp16", 1, 3, "bias"), ("fp16", 1, 1, "norm"), ("fp16", 2, 3, "bias"),
        ("fp16", 3, 2, "up"), ("fp32", 1, 1, "bias"), ("fp32", 2, 1, "bias"), ("bf16", 3, 1, "bias"),
    ]
]
"""Among them a second tp rank's copy of `bias`, which no norm counts."""


def run_cases(module: str, cases: list[dict], folder) -> list[dict]:
    lines = run_ranks(module, 4, [json.dumps(cases)], folder, timeout_s=240)[0].splitlines()
    results = [json.loads(line) for line in lines]
    assert len(results) == len(cases)
    return results


@pytest.fixture(scope="module")
def net_results(tmp_path_factory) -> dict[str, dict]:
    """All cases of the net by their JSON, in one start of the ranks."""
    cases = PLAIN + CONTEXT + OFFLOADED + POISONED
    results = run_cases(NET, cases, tmp_path_factory.mktemp("net"))
    return {json.dumps(case): result for case, result in zip(cases, results, strict=True)}


@pytest.mark.parametrize("case", map(json.dumps, PLAIN + CONTEXT + OFFLOADED))
def test_same_as_the_plain_loop(case, net_results):
    """Losses, norms, weights, evaluation, and every element of the state owned once."""
    result = net_results[case]
    for gap in ("loss_gap", "norm_gap", "value_gap", "evaluate_gap"):
        assert result[gap] <= FP32_TOLERANCE, result
    assert result["min_norm"] > 0.5, "clipping must be active in every step"
    assert result["owned"] == 3 * NET_ELEMENTS, result


@pytest.mark.parametrize("case", map(json.dumps, POISONED))
def test_bad_value_on_one_rank_skips_the_step_on_all(case, net_results):
    result = net_results[case]
    (rank, name), is_fp16 = result["poison"], result["dtype"] == "fp16"
    assert result["skipped"] == [[3, is_fp16]], result
    assert result["same_skips"], result
    assert result["faults"] == [f"rank {rank}: gradient of {name}"], result
    assert result["scale"] == (2**7 if is_fp16 else None), result


def test_given_gradients_over_a_pipeline(tmp_path):
    cases = [
        {"pp": 2, "zero_stage": 0}, {"pp": 2, "zero_stage": 1}, {"pp": 2, "tp": 2, "zero_stage": 1},
        {"pp": 2, "cp": 2, "zero_stage": 1, "offload": True}, {"tp": 2, "zero_stage": 0},
        {"pp": 2, "zero_stage": 1, "bad": [3, "embed"]}, {"pp": 2, "zero_stage": 0, "bad": [2, "last.down"]},
        {"pp": 2, "tp": 2, "zero_stage": 1, "bad": [1, "first.bias"]},
        {"ep": 2, "zero_stage": 0}, {"ep": 2, "zero_stage": 1}, {"ep": 4, "zero_stage": 0}, {"ep": 4, "zero_stage": 1},
        {"ep": 2, "tp": 2, "zero_stage": 0}, {"ep": 2, "tp": 2, "zero_stage": 1},
        {"ep": 2, "pp": 2, "zero_stage": 0}, {"ep": 2, "pp": 2, "zero_stage": 1},
        {"ep": 2, "cp": 2, "zero_stage": 1, "offload": True}, {"ep": 2, "cp": 2, "zero_stage": 0},
        {"ep": 2, "zero_stage": 1, "bad": [3, "first.experts"]}, {"ep": 4, "zero_stage": 0, "bad": [2, "embed"]},
    ]
    for result in run_cases(GIVEN, cases, tmp_path):
        assert result["norm_gap"] <= FP32_TOLERANCE, result
        assert result["value_gap"] <= FP32_TOLERANCE, result
        assert result["owned"] == result["elements"], result
        bad = result.get("bad")
        assert result["skipped"] == ([2] if bad else []), result
        assert result["same_skips"], result
        assert result["faults"] == ([f"rank {bad[0]}: gradient of {bad[1]}"] if bad else []), result
