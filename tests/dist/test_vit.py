"""Vision transformers in any layout train the plain single-process model: fp32, within 1e-6, a row without label too.

One case goes on in another layout, from its state after half the steps. Caught mutations: the head's input not summed
over tp in the backward pass; each sequence shard's positions counted from 0; the patches of a row without label in
MAE's loss with a thousandth of their error; the bias of the classes whole on each tp rank.
"""

import json

import pytest

from tests.support.ranks import run_ranks

MODULE = "tests.dist.programs.vit_parity"
TP = {"tp": 2, "sequence_parallel": False}
CASES = {
    2: [
        ("cls_tp2", "cls", TP, {}),
        ("mean_tp2_sequence_shards", "mean", {"tp": 2}, {}),
        ("dropout_tp2_recompute", "dropout", TP, {"recompute": "full"}),
        ("cls_pp2", "cls", {"pp": 2}, {"recompute": "selective"}),
        ("cls_zero2", "cls", {"zero_stage": 2}, {}),
        ("cls_zero3", "cls", {"zero_stage": 3}, {}),
        ("mae_tp2", "mae", TP, {}),
        ("mae_zero2", "mae", {"zero_stage": 2}, {"recompute": "full"}),
        ("mae_zero3", "mae", {"zero_stage": 3}, {}),
        ("cls_tp2_to_zero3", "cls", TP, {"resume_in": {"zero_stage": 3}}),
    ],
    8: [("cls_tp2_pp2_dp2", "cls", TP | {"pp": 2}, {})],
}


@pytest.mark.parametrize("ranks", CASES)
def test_layouts(ranks, tmp_path):
    cases = []
    for name, model, parallel, train in CASES[ranks]:
        resumed = {key: train[key] for key in train if key == "resume_in"}
        train = {key: value for key, value in train.items() if key != "resume_in"}
        cases.append({"name": name, "model": model, "parallel": parallel, "train": train} | resumed)
    lines = run_ranks(MODULE, ranks, [json.dumps(cases)], tmp_path, timeout_s=400)[0].splitlines()
    results = [json.loads(line) for line in lines]
    assert [result["name"] for result in results] == [case["name"] for case in cases]
    for result in results:
        assert max(result[kind] for kind in ("loss_gap", "norm_gap", "eval_gap")) <= 1e-6, result
