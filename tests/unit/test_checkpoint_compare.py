"""Continuing a checkpoint under a changed config or corpus: what is refused, and with which words."""

from dataclasses import replace

import pytest

from megascale.checkpoint.compare import changed_values, check_same_run
from megascale.errors import CheckpointError
from tests.support.checkpoint_ranks import RUN


def is_safe(key: str) -> bool:
    return key == "train.max_steps"


def changed(**updates):
    return replace(RUN, **updates)


def test_the_same_run_and_safe_changes_pass():
    assert check_same_run(RUN, RUN, is_safe) == []
    longer = changed(config={**RUN.config, "train": {"max_steps": 20}})
    assert [str(change) for change in check_same_run(RUN, longer, is_safe)] == ["train.max_steps = 9 then, 20 now"]


def test_every_other_change_is_refused_with_its_old_and_new_value():
    now = changed(
        config={"model": {"num_layers": 3, "rope_base": 1e4, "d_ff": 8}, "train": {"max_steps": 20}},
        data_fingerprints={"train": "d1", "validation": "other"},
    )
    with pytest.raises(CheckpointError) as refused:
        check_same_run(RUN, now, is_safe)
    message = str(refused.value)
    assert "model.num_layers = 2 then, 3 now" in message
    assert "model.d_ff = 'absent' then, 8 now" in message
    assert "data.validation = 'd2' then, 'other' now" in message
    assert "max_steps" not in message
    assert "d1" not in message


def test_lists_are_values_and_order_counts():
    assert changed_values({"a": {"b": [1, 2]}}, {"a": {"b": [1, 2]}}) == []
    assert [change.key for change in changed_values({"a": {"b": [1, 2]}}, {"a": {"b": [2, 1]}})] == ["a.b"]
