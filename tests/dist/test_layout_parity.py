"""Any legal layout trains the plain single-process model: fp32, 20 steps, clipping active, within 1e-6.

CI runs the cases that `REPRESENTATIVE` names; `make parity` runs all of `tests/support/layouts.py` and prints a table.
"""

import pytest

from tests.dist.parity_table import TOLERANCE, run_cases
from tests.support.layouts import CASES

REPRESENTATIVE = {
    2: ["tp2", "tp2_gpt2", "tp2_dropout_without_sequence_shards", "pp2_documents", "cp2_ring_documents", "cp2_ulysses",
        "tp2_recompute_selective"],
    4: ["tp4_gpt2_dropout", "tp4_one_kv_head", "tp2_dp2_zero2", "tp2_dp2_zero3", "pp2_dp2_interleaved_1f1b",
        "pp2_dp2_zero_bubble", "pp2_dp2_dualpipe_v", "cp2_tp2_ring"],
    8: ["tp2_pp2_dp2", "tp2_cp2_pp2"],
}


def check(results: list[dict]) -> None:
    for result in results:
        assert result["min_norm"] > 0.5, "clipping must be active in every step"
        assert max(result["loss_gap"], result["norm_gap"], result["eval_gap"]) <= TOLERANCE, result


@pytest.mark.parametrize("ranks", REPRESENTATIVE)
def test_representative_layouts(ranks, tmp_path):
    check(run_cases([CASES[name] for name in REPRESENTATIVE[ranks]], tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_layout(name, tmp_path):
    check(run_cases([CASES[name]], tmp_path))
