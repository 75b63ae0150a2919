"""The closed forms of bytes moved agree with each other where the papers say so; `tests/dist` compares them to counts.

Mutations seen to be caught: an all-reduce counted as a reduce-scatter, in ZeRO-0 and in a block's sums.
"""

import pytest

from bench.comm_forms import all_terms
from bench.comm_volume import CASES


@pytest.mark.parametrize("name", CASES)
def test_every_term_counts_and_what_differs_from_the_paper_is_named(name):
    case = CASES[name]
    for rank in range(case.ranks):
        terms = all_terms(case, rank)
        assert all(term.sent > 0 or (term.sent < 0 and term.reason) for term in terms)
        assert any(not term.reason for term in terms)


def test_sequence_shards_move_what_whole_sequences_move():
    """Korthikanti et al. 2022, section 4.2.2: an all-reduce is a reduce-scatter and an all-gather."""
    sharded, whole = (
        sum(term.sent for term in all_terms(CASES[name], 0) if term.axis == "tp" and not term.reason
            and "gradients of norms" not in term.what)
        for name in ("tp2", "tp2 without sequence shards")
    )
    assert sharded == whole


def test_zero_1_moves_what_plain_data_parallelism_moves():
    """Rajbhandari et al. 2020, section 7.2: twice the parameters, but for padding."""
    zero_0, zero_1 = (
        sum(term.sent for term in all_terms(CASES[name], 0) if term.axis == "zero")
        for name in ("dp2 zero0", "dp2 zero1")
    )
    assert zero_0 == pytest.approx(zero_1, rel=1e-3)
