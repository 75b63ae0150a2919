"""The program of the GPU tests, on a CPU: it must be right before a GPU is there, and bf16 keeps near fp32 here too.

Mutations seen to be caught: documents not masked, or ended by another token (two ranks); dropout keyed by step 0 in
every step; only the last batch counted in evaluation (one rank).
"""

import json

import pytest

from tests.gpu.test_layouts_gpu import DOCUMENTS, FP32, GPT2, TOLERANCE, WINDOW, merge
from tests.support.ranks import run_ranks

FP32_TOLERANCE = 1e-6
ONE_ROW = {"train": {"micro_batch_size": 1}}


@pytest.mark.parametrize(("num_ranks", "cases"), [
    (1, [merge(DOCUMENTS, WINDOW), GPT2, merge(FP32, GPT2, DOCUMENTS)]),
    (2, [merge(ONE_ROW, {"parallel": {"pp": 2}}, DOCUMENTS), merge(ONE_ROW, FP32, {"parallel": {"tp": 2}})]),
], ids=["one rank", "two ranks"])
def test_low_precision_stays_near_the_plain_fp32_loop(num_ranks, cases, tmp_path):
    output = run_ranks("tests.dist.programs.device_parity", num_ranks, [json.dumps(cases)], tmp_path, 300)
    results = [json.loads(line) for line in output[0].splitlines()]
    assert [result["case"] for result in results] == cases
    for result in results:
        loss, norm = (FP32_TOLERANCE,) * 2 if "precision" in result["case"] else TOLERANCE["bf16"]
        assert result["min_norm"] > 0.5, "clipping must be active in every step"
        assert max(result["loss_gap"], result["eval_gap"]) <= loss, result
        assert result["norm_gap"] <= norm, result
