"""Learning-rate schedules as pure functions."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.optim.schedules import learning_rate

KINDS = ("constant", "linear", "cosine", "wsd")


@st.composite
def plans(draw):
    """Arguments of a legal schedule."""
    horizon_steps = draw(st.integers(1, 2000))
    warmup_steps = draw(st.integers(0, horizon_steps))
    return {
        "kind": draw(st.sampled_from(KINDS)),
        "peak": draw(st.floats(1e-6, 1.0)),
        "horizon_steps": horizon_steps,
        "warmup_steps": warmup_steps,
        "decay_steps": draw(st.integers(0, horizon_steps - warmup_steps)),
        "min_fraction": draw(st.floats(0.0, 1.0)),
    }


@given(plan=plans(), data=st.data())
@settings(deadline=None, max_examples=300)
def test_rises_through_warmup_and_falls_from_there(plan, data):
    step = data.draw(st.integers(0, plan["horizon_steps"] + 10))
    now, after = (learning_rate(s, **plan) for s in (step, step + 1))
    floor = plan["peak"] * plan["min_fraction"]
    tolerance = 1e-9 * plan["peak"]
    assert 0 <= now <= plan["peak"] + tolerance
    if step + 1 < plan["warmup_steps"]:
        assert after > now > 0
    elif step >= plan["warmup_steps"]:
        assert after <= now + tolerance
        assert now >= floor - tolerance


@given(plan=plans())
@settings(deadline=None, max_examples=300)
def test_ends(plan):
    peak, warmup, horizon = plan["peak"], plan["warmup_steps"], plan["horizon_steps"]
    assert learning_rate(0, **plan) > 0
    if warmup:
        assert learning_rate(warmup - 1, **plan) == peak
    if warmup < horizon:
        assert learning_rate(warmup, **plan) == pytest.approx(peak)
    floor = peak if plan["kind"] == "constant" else peak * plan["min_fraction"]
    if horizon > warmup:
        assert learning_rate(horizon, **plan) == learning_rate(10 * horizon, **plan) == pytest.approx(floor)


def test_values_by_hand():
    def rates(kind, **options):
        return [learning_rate(step, kind=kind, peak=8.0, horizon_steps=10, **options) for step in range(11)]

    assert rates("constant", warmup_steps=4)[:6] == [2, 4, 6, 8, 8, 8]
    assert rates("linear", warmup_steps=2) == pytest.approx([4, 8, 8, 7, 6, 5, 4, 3, 2, 1, 0])
    assert rates("cosine", min_fraction=0.5)[::5] == pytest.approx([8, 6, 4])
    assert rates("wsd", decay_steps=4, min_fraction=0.25) == pytest.approx(
        [8] * 7 + [5, 8 - 6 * 0.5**0.5, 8 - 6 * 0.75**0.5, 2]
    )


def test_a_longer_horizon_leaves_the_stable_part_of_wsd_alone():
    """What lets a run be prolonged: nothing before the decay knows of the horizon."""
    plan = {"kind": "wsd", "peak": 1.0, "warmup_steps": 5, "decay_steps": 20}
    short, long = ([learning_rate(step, horizon_steps=h, **plan) for step in range(80)] for h in (100, 1000))
    assert short == long
