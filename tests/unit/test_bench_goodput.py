"""The goodput model agrees with closed forms, each derived by others in another way.

Mutations seen to be caught: intervals kept that the failure cut; the wait for a save not counted; a failure without a
restart after it; the commit time left out; restarts that no failure hits.
"""

from argparse import Namespace
from dataclasses import fields

import numpy as np
import pytest

from bench.goodput import (
    CLUSTERS,
    RATES,
    Times,
    daly_interval,
    exact_goodput,
    failures_per_s,
    kept_seconds,
    meta_goodput,
    read_times,
    simulate,
    simulated_interval,
    trained_seconds,
)

CASES = [
    Times(), Times(restart_s=895, interval_s=3600, blocking_s=60), Times(restart_s=115, interval_s=120, blocking_s=1),
    Times(commit_s=90), Times(requeue_fraction=0.3, requeue_s=900),
]
RUNS, DAYS = 300, 20.0
STANDARD_ERRORS = 4 / 1.96
"""Of the mean of a simulation, in half-widths of its interval: 4, which chance alone exceeds once in 16,000."""


@pytest.mark.parametrize("times", CASES)
@pytest.mark.parametrize("gpus", [10_240, 16_384])
def test_the_simulated_mean_is_the_exact_one(gpus, times):
    rate = failures_per_s(gpus, RATES["RSC-1"])
    found = simulate(times, rate, DAYS, RUNS, seed=1)
    # A run that begins without a restart and ends with a save loses less than its share by about one failure's loss.
    ends = (times.mean_down_s + times.interval_s + times.commit_s) / (DAYS * 86_400)
    assert -STANDARD_ERRORS * found.half_width <= found.mean - exact_goodput(times, rate)
    assert found.mean - exact_goodput(times, rate) <= STANDARD_ERRORS * found.half_width + ends
    assert found.half_width < 0.005


@pytest.mark.parametrize("per_1000", RATES.values())
@pytest.mark.parametrize("gpus", CLUSTERS)
def test_metas_form_is_within_2_percent_while_losses_are_under_10(gpus, per_1000):
    rate, compared = failures_per_s(gpus, per_1000), 0
    for times in CASES:
        found = simulate(times, rate, DAYS, RUNS, seed=2).mean
        if found > 0.9:
            compared += 1
            assert meta_goodput(times, rate) == pytest.approx(found, rel=0.02)
    assert compared >= 2


@pytest.mark.parametrize("blocking_s", [2.0, 30.0])
@pytest.mark.parametrize("gpus", CLUSTERS)
def test_the_best_simulated_interval_is_dalys_within_10_percent(gpus, blocking_s):
    rate, times = failures_per_s(gpus, RATES["Llama 3"]), Times(blocking_s=blocking_s)
    assert simulated_interval(times, rate, 100_000, seed=3) == pytest.approx(daly_interval(blocking_s, rate), rel=0.1)


def test_the_aim_of_the_design_is_95_percent_on_10240_gpus():
    times = Times()
    assert (times.mean_down_s, times.interval_s, times.blocking_s) == (180, 600, 2)
    assert exact_goodput(times, failures_per_s(10_240, 6.5)) == pytest.approx(0.9514, abs=5e-5)


def test_what_a_stretch_of_training_keeps():
    times = Times(interval_s=100, blocking_s=10, commit_s=5)
    up_s = np.array([-3.0, 50, 114, 115, 224, 225, 300])
    assert kept_seconds(up_s, times).tolist() == [0, 0, 0, 100, 100, 200, 200]
    assert trained_seconds(up_s, times).tolist() == [0, 50, 104, 105, 204, 205, 280]


def options(path=None, **given) -> Namespace:
    return Namespace(**({field.name: None for field in fields(Times)} | {"inputs": path} | given))


def test_options_go_over_a_file_and_a_file_over_the_defaults(tmp_path):
    path = tmp_path / "times.json"
    path.write_text('{"restart_s": 20, "detect_s": 3}')
    assert read_times(options(path, detect_s=4.0)) == Times(detect_s=4.0, restart_s=20)


@pytest.mark.parametrize(("text", "words"), [
    ('{"restart": 20}', "restart unknown; the names are detect_s"), ('{"interval_s": 0}', "interval_s above 0"),
    ('{"requeue_fraction": 2}', "at most 1"), ('{"commit_s": -1}', "0 or more"),
])
def test_numbers_that_make_no_sense_are_refused(text, words, tmp_path):
    path = tmp_path / "times.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_times(options(path))
