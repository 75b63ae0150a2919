"""A LLaMA with all that may be added to it, and PaLM, train as the plain loop does in every kind of layout, to 1e-6.

Mutations seen to be caught, each by the case in brackets: the norms of heads not marked as shared by them
(llama_features_tp2_without_sequence_shards, norm off by 1.4e-4); the gradient of a joined block's input not summed
(palm_tp2_without_sequence_shards, 9.6e-2); linear layers of a joined block that sum by themselves (palm_tp2, by their
shapes). Both sides run the same layers: what these compute is compared in tests/unit/test_model_llama_features.py.
"""

import pytest

from tests.dist.parity_table import KINDS, TOLERANCE, run_cases
from tests.support.layouts import CASES

LAYOUTS = {
    2: ["llama_features_tp2", "llama_features_tp2_without_sequence_shards", "llama_features_pp2",
        "llama_features_cp2_ring", "llama_features_cp2_ulysses", "palm_tp2", "palm_tp2_without_sequence_shards",
        "palm_pp2", "palm_cp2_ring", "palm_cp2_ulysses", "palm_tp2_recompute_selective",
        "palm_pp2_zero_bubble_recompute"],
    4: ["llama_features_tp2_dp2_zero2", "llama_features_tp2_dp2_zero3", "llama_features_tp4", "palm_tp2_dp2_zero2",
        "palm_tp2_dp2_zero3", "palm_tp4"],
    8: ["llama_features_tp2_pp2_dp2", "palm_tp2_pp2_dp2"],
}


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_every_layout_trains_the_plain_model(ranks, tmp_path):
    for result in run_cases([CASES[name] for name in LAYOUTS[ranks]], tmp_path):
        assert max(result[kind] for kind in KINDS) <= TOLERANCE, result
