"""A value that isn't finite, on one rank at chosen steps: found before the update, named, and handled by policy."""

import json

import pytest

from megascale.errors import EXIT_OK, EXIT_RUN
from tests.support.faulty_run import NUM_STEPS, checkpoint_names, faulty_run
from tests.support.tiny_run import read_metrics, write_config

PARAMETER = "blocks.1.feed_forward.output.weight"


def run(corpus, folder, plan: dict, *arguments: str) -> tuple[int, str]:
    """Runs the tiny config with poisoned ranks; gives exit code and output."""
    with faulty_run("poisoned_rank", folder / "plan", plan, write_config(folder, corpus), *arguments) as started:
        code = started.end()
        assert "Traceback" not in started.text()
        return code, started.text()


def steps_of(folder, rank: int) -> list[dict]:
    """What the ranks noted about each step."""
    return [json.loads(line) for line in (folder / "plan" / f"steps_{rank}.jsonl").read_text().splitlines()]


def skipped_steps(folder) -> list[int]:
    return [line["step"] for line in read_metrics(folder / "run") if line.get("is_skipped")]


@pytest.mark.parametrize(
    ("zero_stage", "dtype", "poison"),
    [
        (1, "fp32", {"rank": 1, "value": "nan", "parameter": PARAMETER}),
        (3, "fp32", {"rank": 0, "value": "inf", "parameter": None}),
        (1, "fp16", {"rank": 0, "value": "nan", "parameter": None}),
    ],
)
def test_stop_ends_the_run_before_the_update(corpus, tmp_path, zero_stage, dtype, poison):
    """Exit code 3; the message names step, rank and tensor; state and checkpoints are those from before the step.

    Mutations seen to be caught: the policy is ignored; the fault is ascribed to another rank; in fp16, a loss that
    isn't finite passes for an overflow that a lower loss scale may cure.
    """
    options = [f"parallel.zero_stage={zero_stage}", f"precision.dtype={dtype}"]
    code, text = run(corpus, tmp_path, poison | {"steps": [4]}, *options)
    assert code == EXIT_RUN, text
    tensor = f"gradient of {PARAMETER}" if poison["parameter"] else "loss"
    fault = f"error: step 5: not finite: rank {poison['rank']}: {tensor}; the update was not applied"
    assert text.splitlines()[-1].startswith(fault), text
    assert text.count("not finite") == 1
    for rank in (0, 1):
        last = steps_of(tmp_path, rank)[-1]
        assert last["step"] == 4
        assert last["after"] == last["before"]
    assert checkpoint_names(tmp_path / "run") == ["step_00000003"]
    assert read_metrics(tmp_path / "run")[-1]["step"] == 4


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_skip_leaves_the_step_out_and_goes_on(corpus, tmp_path, zero_stage):
    """Steps 5, 6 and 9 are bad. Mutation seen to be caught: skipped steps add up for ever."""
    plan = {"rank": 1, "steps": [4, 5, 8], "value": "inf", "parameter": PARAMETER}
    code, text = run(
        corpus, tmp_path, plan, "train.on_nonfinite=skip", "train.max_skipped_steps=3",
        f"parallel.zero_stage={zero_stage}",
    )
    assert code == EXIT_OK, text
    assert f"warning: step 5: not finite: rank 1: gradient of {PARAMETER}; the update was not applied" in text
    assert skipped_steps(tmp_path) == [5, 6, 9]
    for rank in (0, 1):
        unchanged = [step["step"] for step in steps_of(tmp_path, rank) if step["after"] == step["before"]]
        assert unchanged == [4, 5, 8]
    state = json.loads((tmp_path / f"run/checkpoints/step_{NUM_STEPS:08d}/index.json").read_text())["state"]
    assert (state["skipped_steps"], state["skipped_in_a_row"]) == (3, 0)
    assert state["optimizer_scalars"]["step"] == NUM_STEPS - 3


def test_too_many_skipped_steps_in_a_row_end_the_run(corpus, tmp_path):
    """Three in a row are too many, two aren't. Mutation seen to be caught: steps in a row aren't counted."""
    plan = {"rank": 0, "steps": [1, 2, 4, 5, 6, 7], "value": "nan", "parameter": None}
    code, text = run(corpus, tmp_path, plan, "train.on_nonfinite=skip", "train.max_skipped_steps=3")
    assert code == EXIT_RUN, text
    assert "error: step 7: not finite: rank 0: loss" in text
    assert "as in the 2 steps before (train.max_skipped_steps = 3)" in text
    assert skipped_steps(tmp_path) == [2, 3, 5, 6]


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_an_fp16_overflow_on_one_rank_lowers_the_loss_scale_on_all(corpus, tmp_path, zero_stage):
    """It isn't a fault: the run goes on under the `stop` policy.

    Mutations seen to be caught: the scale stays; an overflow counts as a fault.
    """
    plan = {"rank": 1, "steps": [4], "value": "inf", "parameter": PARAMETER}
    code, text = run(
        corpus, tmp_path, plan, "precision.dtype=fp16", "precision.initial_loss_scale_log2=8",
        f"parallel.zero_stage={zero_stage}",
    )
    assert code == EXIT_OK, text
    assert skipped_steps(tmp_path) == [5]
    for rank in (0, 1):
        steps = steps_of(tmp_path, rank)
        assert [step["scale"] for step in steps] == [256.0] * 4 + [128.0] * (NUM_STEPS - 4)
        assert [step["step"] for step in steps if step["after"] == step["before"]] == [4]
