"""Every optimizer trains the plain single-process model in any layout, and goes on in any other from a checkpoint.

Each case: 6 steps against a plain fp64 loop with the same optimizer over whole tensors; saved after 3 and resumed in
another layout; the loss of the averaged weights at the end of both. Within 1e-6 in fp32.

Mutations seen to be caught: partitions not gathered before a matrix is orthogonalised, which only matrices on a border
between partitions notice, hence five layers (muon_zero1); factors written by every tp rank (adafactor_tp2_pp2); the
average not put in place of the weights where a model has routers (muon_ep2_tp2); the average begun after the first
update (groups_zero2).
"""

import json

import pytest

from tests.support.ranks import run_ranks

MODULE = "tests.dist.programs.optimizers"
EXPERTS = {"num_experts": 4, "top_k": 2, "d_expert": 24, "num_dense_layers": 1, "balance": "none"}
CASES = [
    {"name": "muon_zero1", "model": "llama_uneven", "optimizer": {"kind": "muon"}, "parallel": {},
     "resumed": {"tp": 2, "pp": 2}},
    {"name": "muon_tp2_dp2", "model": "gpt2", "optimizer": {"kind": "muon"}, "parallel": {"tp": 2},
     "resumed": {"tp": 2}},
    {"name": "muon_ep2_tp2", "model": "moe", "shape": {"moe": EXPERTS}, "optimizer": {"kind": "muon"},
     "parallel": {"ep": 2, "tp": 2}, "resumed": {"ep": 4}},
    {"name": "adafactor_tp2_pp2", "model": "gpt2", "optimizer": {"kind": "adafactor", "learning_rate": 0.01},
     "parallel": {"tp": 2, "pp": 2}, "resumed": {}},
    {"name": "adafactor_again", "model": "gpt2", "optimizer": {"kind": "adafactor"}, "parallel": {"zero_stage": 0},
     "resumed": {"zero_stage": 0}},
    {"name": "lion_pp2_dp2", "model": "gpt2", "optimizer": {"kind": "lion", "eps": 1.0}, "parallel": {"pp": 2},
     "resumed": {"zero_stage": 3}},
    {"name": "groups_zero2", "model": "llama", "parallel": {"tp": 2, "zero_stage": 2}, "resumed": {"pp": 2},
     "optimizer": {"groups": [{"match": "embedding.*", "lr_factor": 0.3, "weight_decay": 0.0},
                              {"match": "*norm*", "lr_factor": 2.0}]}},
    {"name": "mup_zero3", "model": "llama", "shape": {"mup_base_width": 16}, "optimizer": {},
     "parallel": {"zero_stage": 3}, "resumed": {"tp": 2}},
]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("optimizers")
    lines = run_ranks(MODULE, 4, [str(folder), json.dumps(CASES)], folder, timeout_s=400)[0].splitlines()
    return {result["name"]: result for result in map(json.loads, lines)}


@pytest.mark.parametrize("name", [case["name"] for case in CASES])
def test_layouts_and_resumption(name, results):
    result = results[name]
    assert result["moved"] > 0.01, "the steps must change something"
    assert result["gap"] <= 1e-6, result
    assert result["resumed_gap"] <= 1e-6, result
    assert result["equal"] in (True, None), result
