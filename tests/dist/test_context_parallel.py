"""Attention over a row that lies over cp ranks is dense attention over the whole row, with its gradients.

Mutations seen to be caught (each by the named cases, of ring or ulysses, with 4 ranks and where not said with 2 too):
steps merged by exponentials without their maximum; earlier steps not rescaled when a later one is merged; gradients of
keys and values not brought home; those of the ranks before dropped on the way (4 ranks); chunks dealt out contiguously;
keys from an earlier rank taken from its second chunk, queries for a later rank's from the first (plain); the source of
the visiting keys counted the wrong way round (4 ranks); documents, or the window, ignored between chunks; a tile of the
window skipped one key too early; a query without a key in its tile not guarded (NaN); a tile's gradients from its own
log-sum-exp (documents, window, 4 ranks); gradients sent once more than needed, kv heads repeated before they are sent
(numbers sent); kv heads repeated in the wrong order (ulysses, 2 kv heads, 4 ranks); heads not grouped by the rank that
they go to; the mask left out after the exchange (ulysses).
"""

import json

import pytest

from tests.dist.programs.context_parallel import HEAD_DIM, POSITIONS, ROWS
from tests.support.ranks import run_ranks

MODULE = "tests.dist.programs.context_parallel"
FP32_TOLERANCE = 1e-6
HALF_TOLERANCE = {"bfloat16": 2e-2, "float16": 3e-3}
"""Relative to the largest number: inputs and results are rounded to 8 and 11 bits, those of a ring tile by tile."""
LARGE_SCORES_TOLERANCE = 1e-4
"""A score of 300 is off by 300 x 2^-24 = 2e-5 at each rounding in fp32, and its exponential relatively as much."""
MASKS = ("plain", "documents", "window", "both")


def measure(world_size: int, cases: list[dict], folder) -> list[dict]:
    lines = run_ranks(MODULE, world_size, [json.dumps(cases)], folder)[0].splitlines()
    results = [json.loads(line) for line in lines]
    assert len(results) == len(cases)
    return results


def case(kind: str, kv_heads: int, mask: str, **options) -> dict:
    return {"kind": kind, "kv_heads": kv_heads, "mask": mask, "dtype": "float32", "mode": "eager"} | options


@pytest.mark.parametrize("cp", [2, 4])
def test_fp32_matches_dense_attention(cp, tmp_path):
    """kv heads 1 and 2 are grouped; with ulysses a rank then has no whole kv head of its own."""
    cases = [case(kind, kv_heads, mask) for kind in ("ring", "ulysses") for kv_heads in (4, 2, 1) for mask in MASKS]
    # Tiles smaller than a chunk: of the keys of one step a query sees some, all or none by tile.
    cases += [case("ring", 2, mask, tile=5) for mask in MASKS]
    for result in measure(cp, cases, tmp_path):
        assert result["gap"] <= FP32_TOLERANCE, result


def test_exponentials_of_large_scores_do_not_overflow(tmp_path):
    """Steps are merged relative to the larger log-sum-exp, as scores are within one."""
    for result in measure(2, [case("ring", 4, mask, scale=8) for mask in MASKS], tmp_path):
        assert result["gap"] <= LARGE_SCORES_TOLERANCE, result


def test_recomputed_and_compiled(tmp_path):
    cases = [case(kind, 2, mask, mode=mode) for kind in ("ring", "ulysses") for mask in ("plain", "both")
             for mode in ("recompute", "compile")]
    for result in measure(2, cases, tmp_path):
        assert result["gap"] <= FP32_TOLERANCE, result


@pytest.mark.parametrize("dtype", list(HALF_TOLERANCE))
def test_half_precision_stays_near(dtype, tmp_path):
    cases = [case(kind, 2, mask, dtype=dtype) for kind in ("ring", "ulysses") for mask in ("plain", "both")]
    for result in measure(2, cases, tmp_path):
        assert result["gap"] <= HALF_TOLERANCE[dtype], result


@pytest.mark.parametrize("cp", [2, 4])
def test_the_ring_sends_what_its_formula_says(cp, tmp_path):
    """(n - 1) times the keys and values forward, and backward as many again with their gradients."""
    (result,) = measure(cp, [case("ring", 2, "plain")], tmp_path)
    of_a_rank = 2 * ROWS * POSITIONS // cp * 2 * HEAD_DIM
    assert result["sent"] == 3 * (cp - 1) * of_a_rank
