"""Every pipeline schedule gives the gradients, losses and logits of the model in one piece, and sends no byte too many.

Mutations seen to be caught: deferred weight gradients never computed, or computed twice; torch's own split of backward
passes in place of the queue; the sum of losses not begun anew with a step; the guard of infinite losses left out; one
micro-batch's inputs for all, in training or in evaluation; the step's number not passed on; micro-batches prepared once
a stage; `scale_grads` on; receive buffers kept; logits broadcast from the first rank; eval mode left on.
"""

import json
from itertools import pairwise

import pytest

from megascale.parallel.stages import rank_of_stage
from tests.support.ranks import run_ranks

MODULE = "tests.dist.programs.pipeline"
TOLERANCE = 1e-6
HIDDEN_BYTES = 2 * 3 * 8 * 4
UNEVEN_4, UNEVEN_2 = [1, 4, 2, 3], [7, 3]


def case(schedule: str, stages_per_rank: int, num_micro_batches: int, stage_blocks: list[int] | None = None) -> dict:
    return {
        "schedule": schedule, "stages_per_rank": stages_per_rank, "num_micro_batches": num_micro_batches,
        "stage_blocks": stage_blocks,
    }


def check(cases: list[dict], pp: int, folder) -> None:
    """Cases share the start of their ranks, which takes longer than all of them."""
    outputs = [[json.loads(line) for line in text.splitlines()] for text in
               run_ranks(MODULE, pp, [json.dumps(cases)], folder)]
    for each, results in zip(cases, zip(*outputs, strict=True), strict=True):
        for result in results:
            shown = f"{each}\n{result}"
            assert max(result["gaps"]) <= TOLERANCE, shown
            assert max(result["loss_gaps"]) <= TOLERANCE, shown
            assert max(result["eval_gaps"]) <= TOLERANCE, shown
            assert result["logits_gap"] <= TOLERANCE, shown
            assert result["times_prepared"] == [1], shown
            assert result["keeps_grad_views"], shown
            assert result["buffers"] == 0, shown
            holds_last = pp * each["stages_per_rank"] - 1 in result["own"]
            assert result["loss_is_finite"] != holds_last, shown
            assert not result["is_finite"], shown
        assert sum(result["bytes_sent"] for result in results) == expected_bytes(each, pp), each


def expected_bytes(each: dict, pp: int) -> int:
    """A hidden state and its gradient for each micro-batch at each border between two ranks."""
    ranks = [rank_of_stage(each["schedule"], pp, stage) for stage in range(pp * each["stages_per_rank"])]
    num_borders = sum(one != other for one, other in pairwise(ranks))
    return 2 * HIDDEN_BYTES * num_borders * each["num_micro_batches"]


def test_one_stage_a_rank(tmp_path):
    check([case("gpipe", 1, 1), case("gpipe", 1, 3, UNEVEN_2), case("1f1b", 1, 2), case("1f1b", 1, 5, UNEVEN_2)],
          2, tmp_path)


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "zero_bubble"])
def test_looped_schedules(schedule, tmp_path):
    check([case(schedule, 2, 1), case(schedule, 2, 3), case(schedule, 2, 6, UNEVEN_4), case(schedule, 3, 4)],
          2, tmp_path)


def test_zero_bubble_with_one_stage_a_rank(tmp_path):
    check([case("zero_bubble", 1, 4, UNEVEN_2)], 2, tmp_path)


def test_v_shaped_schedules(tmp_path):
    check([case("zero_bubble_v", 2, 1), case("zero_bubble_v", 2, 5, UNEVEN_4), case("dualpipe_v", 2, 4),
           case("dualpipe_v", 2, 7, UNEVEN_4)], 2, tmp_path)


def test_four_ranks(tmp_path):
    check([case("1f1b", 1, 4), case("1f1b", 1, 6, UNEVEN_4), case("interleaved_1f1b", 2, 10),
           case("zero_bubble_v", 2, 4), case("dualpipe_v", 2, 8)], 4, tmp_path)
