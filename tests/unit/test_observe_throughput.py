"""Speed, MFU and the peaks it is measured against."""

import pytest

from megascale.observe.peaks import peak_bf16_flops
from megascale.observe.throughput import StepTimer, derive_mfu


class FakeClock:
    """Seconds that a test sets."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def timer_after(durations_s: list[float], pause_s: float = 0.0, **arguments) -> StepTimer:
    clock = FakeClock()
    timer = StepTimer(clock=clock, **({"flops_per_token": 6e9, "peak_flops": 1e14} | arguments))
    for duration_s in durations_s:
        timer.start()
        clock.now_s += duration_s
        timer.stop(num_tokens=1000)
        clock.now_s += pause_s
    return timer


def test_speed_leaves_out_what_happens_between_steps():
    speed = timer_after([0.5, 0.5], pause_s=30.0).speed(steps_left=10)
    assert (speed.step_s, speed.tokens_per_s, speed.eta_s) == pytest.approx((0.5, 2000.0, 5.0))
    assert speed.mfu_fraction == pytest.approx(2000 * 6e9 / 1e14)


def test_one_slow_step_does_not_move_the_time_left():
    assert timer_after([60.0, 0.5, 0.5]).speed(steps_left=10).eta_s == pytest.approx(5.0)


def test_window_forgets():
    assert timer_after([60.0, 0.5, 0.5], window_steps=2).speed(steps_left=1).step_s == pytest.approx(0.5)


def test_nothing_is_claimed_before_the_first_step():
    speed = timer_after([]).speed(steps_left=10)
    assert (speed.tokens_per_s, speed.mfu_fraction, speed.eta_s) == (0.0, None, None)


def test_no_peak_no_mfu():
    assert derive_mfu(1000.0, 6e9, None) is None
    assert timer_after([1.0], peak_flops=None).speed(1).mfu_fraction is None


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("cpu", None),
    ],
)
def test_peaks_are_of_exactly_that_device(name, tflops):
    assert peak_bf16_flops(name) == (None if tflops is None else tflops * 1e12)
