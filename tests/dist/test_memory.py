"""Every rank holds what the closed forms say, within 2 %: the training state, and what a block keeps for backward.

Mutations seen to be caught: an fp32 master beside the fp32 parameter that could be it; the gathered inputs of column
layers kept in place of their shard; `selective` keeping every product and message.

Masks aren't in the forms: a CPU keeps them as fp32, up to 1.97 % of a block here (bert, and a decoder).
"""

import json

import pytest

from bench.memory import KEPT_CASES, STATE_CASES
from tests.support.ranks import run_ranks

TOLERANCE = 0.02
KEPT_TOO_LONG = {"dp2 zero2 fp32"}
"""DeepSpeed's ZeRO-2 leaves fp32 gradients as views of the bucket that was reduced: some of another rank's share stays,
2.4 % of the state here. The bench shows it."""


def measure(table: str, cases: dict, ranks: int, folder) -> list[dict]:
    names = [name for name, case in cases.items() if case.ranks == ranks]
    options = json.dumps({"table": table, "cases": names, "prints": "json"})
    printed = run_ranks("bench.memory_rank", ranks, [options], folder, timeout_s=300)
    return [result for text in printed for result in json.loads(text.splitlines()[-1])]


def check(results: list[dict]) -> None:
    assert results
    for result in results:
        if result["name"] in KEPT_TOO_LONG:
            assert result["measured"] > result["ours"], "no longer kept too long: take it off the list"
            continue
        assert result["measured"] == pytest.approx(result["ours"], rel=TOLERANCE), result


@pytest.mark.parametrize("ranks", [2, 4])
def test_training_state_is_that_of_the_zero_formulas(ranks, tmp_path):
    check(measure("state", STATE_CASES, ranks, tmp_path))


@pytest.mark.parametrize("ranks", [1, 2])
def test_activations_of_a_block_are_those_of_the_forms(ranks, tmp_path):
    check(measure("kept", KEPT_CASES, ranks, tmp_path))
