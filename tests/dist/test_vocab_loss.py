"""Over tp: the loss of a cut vocabulary, and what recompute sends again.

Mutations seen to be caught: the maximum of this rank's own columns alone; the label's logit not summed over the ranks;
the first id of a rank forgotten; padding left in the softmax; the collectives between the products of a half not kept;
the first product not kept.
"""

import json

import pytest

from tests.support.ranks import run_ranks

MODULE = "tests.dist.programs.vocab_loss"
ROWS, PADDED, ROWS_PER_CHUNK = 50, 64, 7
TOLERANCE = 1e-6


@pytest.mark.parametrize("vocab_size", [61, 40], ids=["some padding", "a rank of padding alone"])
@pytest.mark.parametrize("tp", [2, 4])
def test_the_loss_of_a_cut_vocabulary(tp, vocab_size, tmp_path):
    results = [json.loads(text) for text in run_ranks(MODULE, tp, ["loss", str(vocab_size)], tmp_path)]
    assert len({result["loss"] for result in results}) == 1, "equal on every rank"
    for result in results:
        assert max(result["loss_gap"], result["hidden_gap"], result["weight_gap"]) <= TOLERANCE, result
        assert result["most_elements"] == max(ROWS * 16, ROWS_PER_CHUNK * PADDED // tp), "no tensor has all logits"
        num_chunks = -(-ROWS // ROWS_PER_CHUNK)
        assert result["num_reduced"] == 2 * num_chunks + 1, "two a chunk, and one for the hidden state's gradient"


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["plain", "sequence"])
def test_what_recompute_computes_and_sends_again(kind, dropout, tmp_path):
    """2 blocks, one kv head for both ranks. Without recompute each half has 2 products forward and 4 backward."""
    for text in run_ranks(MODULE, 2, ["recompute", kind, str(dropout)], tmp_path):
        none, selective, full = (json.loads(line) for line in text.splitlines())
        for result in (selective, full):
            assert result["loss"] == none["loss"]
            assert result["gradients"] == none["gradients"]
        assert selective["counts"]["aten.mm"] == none["counts"]["aten.mm"]
        assert full["counts"]["aten.mm"] == none["counts"]["aten.mm"] + 2 * (4 if dropout else 3)
        more = {
            name: selective["counts"][name] - none["counts"][name] for name in none["counts"] if "wait" not in name
        }
        gathered = more.pop("_c10d_functional.all_gather_into_tensor")
        assert gathered == (2 * 2 if kind == "sequence" else 0), "the input of each half, whose whole is never kept"
        assert not any(more.values()), more
