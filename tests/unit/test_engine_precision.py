"""The loss scaler over a change of precision."""

import pytest

from megascale.engine.precision import build_loss_scaler, restore_scaler, scaler_values


def test_a_scaler_goes_on_where_it_was():
    old, new = (build_loss_scaler("fp16", 16, 1000) for _ in range(2))
    old.cur_scale, old.last_overflow_iter = 1024, 7
    old.update_scale(False)
    restore_scaler(new, {"step": 2.0, **scaler_values(old)})
    assert scaler_values(new) == scaler_values(old) != scaler_values(build_loss_scaler("fp16", 16, 1000))


@pytest.mark.parametrize(("then", "now"), [("bf16", "fp16"), ("fp32", "fp16"), ("fp16", "bf16"), ("fp32", "bf16")])
def test_another_precision_begins_as_a_new_run_would(then, now):
    """Mutation seen to be caught: the scaler's values are demanded of every checkpoint."""
    scaler = build_loss_scaler(now, 12, 1000)
    restore_scaler(scaler, {"step": 2.0, **scaler_values(build_loss_scaler(then, 16, 1000))})
    assert scaler.loss_scale == (4096.0 if now == "fp16" else 1.0)


def test_half_a_scaler_is_refused():
    scaler = build_loss_scaler("fp16", 16, 1000)
    values = scaler_values(scaler)
    values.popitem()
    with pytest.raises(KeyError):
        restore_scaler(scaler, values)
