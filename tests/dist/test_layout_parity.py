"""Any legal layout trains the plain single-process model: fp32, 20 steps, clipping active, within 1e-6.

CI runs the cases that `REPRESENTATIVE` names; `make parity` runs all of `tests/support/layouts.py` and prints a table.
In bf16 and fp16 the bound is twice what one layout differs by when its rows are split up otherwise.

Mutations seen to be caught, each by the case in brackets: the mark of parameters that every tp rank has forgotten (tp2,
tp2_dp2_zero3); gradients of norms not summed over sequence shards (tp2); a tied embedding's two gradients not summed,
or its copy counted twice (pp2_zero0); the loss as a mean of means over unequal token counts (tp2); equal dropout on the
sequence shards of tp ranks (tp4_gpt2_dropout), and unequal dropout where they hold the same
(tp2_dropout_without_sequence_shards); the gradient of a column layer's inputs not summed (tp2_without_sequence_shards);
the first query heads of a shared kv head on every rank (tp4_one_kv_head); a row layer's bias added on every rank
(tp2_gpt2); labels not taken along with the positions of a cp rank (cp2_ring_documents). The plain loop has the model's
own layers, so what these compute is for the unit tests to say.
"""

import pytest

from tests.dist.parity_table import KINDS, TOLERANCE, bounds_of, main, run_cases
from tests.support.layouts import CASES, HALF_PRECISION

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
        assert max(result[kind] for kind in KINDS) <= TOLERANCE, result


@pytest.mark.parametrize("ranks", REPRESENTATIVE)
def test_representative_layouts(ranks, tmp_path):
    check(run_cases([CASES[name] for name in REPRESENTATIVE[ranks]], tmp_path))


@pytest.mark.parametrize("dtype", HALF_PRECISION)
def test_half_precision_layouts(dtype, tmp_path):
    bounds = bounds_of(dtype, tmp_path)
    for result in run_cases([case for case in HALF_PRECISION[dtype] if case.ranks == 2], tmp_path):
        assert all(result[kind] <= bound for kind, bound in bounds.items()), (result, bounds)


@pytest.mark.slow
def test_every_layout():
    assert main([]) == 0
