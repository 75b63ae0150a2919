"""BERT in any layout trains the plain single-process model: fp32, clipping and dropout active, within 1e-6.

Rows have padding, pairs of segments, whole words and documents. Mutation seen to be caught: the pair's loss counted on
tp ranks without the row's start (tp2).
"""

import json

import pytest

from tests.dist.programs.bert import CASES
from tests.support.ranks import run_ranks

TOLERANCE = 1e-6
KINDS = ("loss_gap", "norm_gap", "eval_gap")


@pytest.mark.parametrize("ranks", sorted({case.ranks for case in CASES.values()}))
def test_layouts(ranks, tmp_path):
    names = [case.name for case in CASES.values() if case.ranks == ranks]
    output = run_ranks("tests.dist.programs.bert", ranks, [json.dumps(names)], tmp_path, timeout_s=400)
    results = [json.loads(line) for line in output[0].splitlines()]
    assert [result["name"] for result in results] == names
    for result in results:
        assert result["min_norm"] > 0.5, "clipping must be active in every step"
        assert max(result[kind] for kind in KINDS) <= TOLERANCE, result
