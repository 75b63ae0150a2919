"""Layouts of models with an encoder and a decoder train the plain single-process model: fp32, within 1e-6.

T5 has dropout in both parts, documents packed into one row, padding, a bias table that all stages use and a tied head
whose embedding both parts read.

Mutation seen to be caught: the gradient of the bias table not summed over the pipeline (pp2: norm off by 1.7e-4).
"""

import json

import pytest

from tests.support.pairs import CASES, CLIP_NORM
from tests.support.ranks import run_ranks

TOLERANCE = 1e-6


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_layouts_train_the_plain_model(ranks, tmp_path):
    names = [case.name for case in CASES.values() if case.ranks == ranks]
    lines = run_ranks("tests.dist.programs.pair_parity", ranks, [json.dumps(names)], tmp_path, timeout_s=400)[0]
    results = [json.loads(line) for line in lines.splitlines() if line.startswith("{")]
    assert [result["name"] for result in results] == names
    for result in results:
        assert result["min_norm"] > CLIP_NORM, "clipping must be active in every step"
        assert max(result[kind] for kind in ("loss_gap", "norm_gap", "eval_gap")) <= TOLERANCE, result
