"""Any legal layout trains a mixture of experts as a plain single process does: fp32, 4 steps, within 1e-6.

Compared are losses and gradient norms (of the losses of the routers too), the evaluation, the figures for the log, and,
to the bit, the biases that keep experts in balance. The plain loop has the model's own layers; that they compute what
they should is for `tests/unit/test_model_moe.py` to say.

Mutations seen to be caught, each by the case in brackets: gradients of gates not summed over tp
(tp2_without_sequence_shards); a row's counts and choices not summed over cp (cp2_ring_dropping); biases moved by a
rank's own load (dp2_zero3_deepseek); tokens counted in the forward pass, so twice under recompute (pp2_recompute);
outputs not put back into the order in which tokens came over ep (ep2).

In the layouts over ep without drops and recompute, the bytes of all-to-alls over all ranks are those of the formula.
"""

import json

import pytest

from tests.dist.programs.moe_parity import CASES
from tests.support.ranks import run_ranks

MODULE = "tests.dist.programs.moe_parity"
TOLERANCE = 1e-6


@pytest.mark.parametrize("ranks", [2, 4])
def test_layouts_equal_the_plain_loop(ranks, tmp_path):
    names = [case.name for case in CASES.values() if case.ranks == ranks]
    output = run_ranks(MODULE, ranks, [json.dumps(names)], tmp_path, timeout_s=60 + 60 * len(names))
    results = [json.loads(line) for line in output[0].splitlines()]
    assert [result["name"] for result in results] == names
    for result in results:
        assert result["bias_gap"] == 0.0, result
        assert max(value for key, value in result.items() if key.endswith("_gap")) <= TOLERANCE, result
