"""The state of a run: how it advances, and that JSON carries it unchanged."""

import json
from dataclasses import FrozenInstanceError, asdict, fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.checkpoint.records import parse_record, to_json
from megascale.checkpoint.state import RunState
from megascale.data.ledger import NO_DIGEST, ReadCounts, StepCounts, chain_digest
from megascale.engine.base import StepOutput
from megascale.errors import CheckpointError

START = RunState.at_start("run-1")
counts = st.integers(0, 2**62)
states = st.builds(
    RunState, step=counts, rows=counts, tokens=counts, skipped_steps=counts, skipped_in_a_row=counts,
    evaluated_step=counts, validation_loss=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    ledger=st.dictionaries(st.text(), st.builds(ReadCounts, counts, counts, counts)),
    stream_digest=st.from_regex(r"[0-9a-f]{16}", fullmatch=True), wandb_run_id=st.none() | st.text(),
    optimizer_scalars=st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False)),
)


def output(is_skipped: bool) -> StepOutput:
    return StepOutput(loss=1.0, grad_norm=1.0, num_tokens=100, is_skipped=is_skipped, loss_scale=1.0)


CORPORA = ["code", "new", "web"]
EACH = StepCounts(labels=100, digest_sum=7, read=(ReadCounts(6, 90, 1), ReadCounts(0, 0, 0), ReadCounts(2, 40, 0)))


def test_a_skipped_step_reads_rows_but_trains_on_no_tokens():
    state = START
    for is_skipped in (False, True, True):
        state = state.advance(output(is_skipped), EACH, CORPORA)
    assert (state.step, state.rows, state.tokens) == (3, 24, 100)
    assert (state.skipped_steps, state.skipped_in_a_row) == (2, 2)
    assert state.ledger == {"code": ReadCounts(18, 270, 3), "web": ReadCounts(6, 120, 0)}
    assert state.stream_digest == chain_digest(chain_digest(chain_digest(NO_DIGEST, 7), 7), 7)
    state = state.advance(output(False), EACH, CORPORA)
    assert (state.skipped_steps, state.skipped_in_a_row) == (2, 0)


@settings(deadline=None, max_examples=300)
@given(states)
def test_json_carries_every_bit(state):
    back = parse_record(RunState, to_json(asdict(state)), Path("x"))
    assert back == state
    assert {k: v.hex() for k, v in back.optimizer_scalars.items()} == {
        k: v.hex() for k, v in state.optimizer_scalars.items()
    }


@pytest.mark.parametrize("name", [field.name for field in fields(RunState)])
def test_a_missing_field_is_refused_by_name(name):
    values = asdict(START)
    del values[name]
    with pytest.raises(CheckpointError, match=f"state.json: {name}: missing"):
        parse_record(RunState, to_json(values), Path("state.json"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("surprise", 1), ("step", "3"), ("step", 3.5), ("step", -1), ("step", True), ("wandb_run_id", 5),
     ("ledger", {"web": {"rows": 1, "tokens": 1}}), ("stream_digest", "xyz")],
)
def test_unknown_fields_and_wrong_types_are_refused_by_name(name, value):
    with pytest.raises(CheckpointError, match=f"state.json: {name}[^:]*: "):
        parse_record(RunState, to_json({**asdict(START), name: value}), Path("state.json"))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_scalars_that_are_not_finite_are_refused(number):
    text = json.dumps({**asdict(START), "optimizer_scalars": {"loss_scale": 0}}).replace("0}}", f"{number}}}}}")
    with pytest.raises(CheckpointError, match=r"optimizer_scalars\.loss_scale"):
        parse_record(RunState, text.encode(), Path("x"))


def test_changes_are_checked_and_the_state_is_frozen():
    with pytest.raises(ValueError, match="-1 is negative"):
        replace(START, step=-1)
    with pytest.raises(FrozenInstanceError):
        START.step = 5
