"""`megascale eval`: the validation loss of training again, from the checkpoint alone, in any layout.

Mutations that must fail it: shares of tp ranks are added up; rows that fill the last batch are counted; hits are those
of one tp rank's vocabulary.
"""

import json

import pytest

from tests.support.tiny_run import megascale, read_metrics

LAYOUTS = {"1": [], "2": ["--set", "parallel.tp=2"], "4": ["--set", "parallel.pp=2"]}


def test_the_loss_is_that_of_training_in_any_layout(clean):
    last = [line for line in read_metrics(clean) if line["kind"] == "eval"][-1]
    found = []
    for num_ranks, layout in LAYOUTS.items():
        done = megascale("eval", clean, "--nproc", num_ranks, "--json", *layout)
        assert done.returncode == 0, done.stderr
        record = json.loads(done.stdout.splitlines()[-1])
        assert record["step"] == 12
        found.append(record["validation"]["corpus"])
    for each in found:
        assert each["loss"] == pytest.approx(last["loss"], rel=1e-6)
        assert each["num_labels"] == last["num_tokens"]
        assert each["bits_per_byte"] == pytest.approx(last["bits_per_byte"], rel=1e-6)
        assert each["accuracy"] == found[0]["accuracy"]
    assert 0.05 < found[0]["accuracy"] < 1


def test_what_cannot_be_is_refused(clean):
    for arguments, part in (
        (["--ema"], "has no averaged weights"),
        (["--set", "model.d_model=64"], "the weights are of the model that was trained"),
        (["--tasks", ","], "--tasks: name tasks of lm-evaluation-harness"),
    ):
        done = megascale("eval", clean, *arguments)
        assert done.returncode != 0
        assert part in done.stderr
        assert "Traceback" not in done.stderr
