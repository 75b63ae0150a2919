"""Speed of training: tokens per second, MFU and the time left, from the durations of the last steps."""

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Speed:
    """Speed over the last steps; the fields mean what they mean in `TrainRecord`."""

    step_s: float
    tokens_per_s: float
    mfu_fraction: float | None
    eta_s: float | None


def derive_mfu(tokens_per_s: float, flops_per_token: float | None, peak_flops: float | None) -> float | None:
    """Model FLOPs utilization: useful model FLOPs per second over the peak of all devices together.

    Recomputed activations don't count as useful. Returns None when either number isn't known.

    Source: PaLM (Chowdhery et al. 2022), appendix B.
    """
    if not flops_per_token or not peak_flops:
        return None
    return tokens_per_s * flops_per_token / peak_flops


class StepTimer:
    """Times the steps that run between `start` and `stop`, so that evaluation and saves don't count.

    The window is short so that a change of speed shows, and the time left rests on the median, which one slow
    step (compilation, a slow disk) doesn't move.
    """

    def __init__(
        self,
        flops_per_token: float | None,
        peak_flops: float | None,
        window_steps: int = 20,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Starts with an empty window.

        Args:
            flops_per_token: model FLOPs of one token, forward and backward, or None.
            peak_flops: peak of all devices together in FLOP/s, or None when it isn't known.
            window_steps: steps to average over.
            clock: tells seconds; a test passes its own.
        """
        self._flops_per_token, self._peak_flops, self._clock = flops_per_token, peak_flops, clock
        self._durations_s: deque[float] = deque(maxlen=window_steps)
        self._tokens: deque[int] = deque(maxlen=window_steps)
        self._started_s = 0.0

    def start(self) -> None:
        """Marks the beginning of a step, the wait for its data included."""
        self._started_s = self._clock()

    def stop(self, num_tokens: int) -> None:
        """Marks the end of a step over `num_tokens` of the global batch."""
        self._durations_s.append(self._clock() - self._started_s)
        self._tokens.append(num_tokens)

    def speed(self, steps_left: int) -> Speed:
        """Speed over the window; zeros before the first step ended."""
        elapsed_s = sum(self._durations_s)
        if elapsed_s <= 0.0:
            return Speed(0.0, 0.0, None, None)
        tokens_per_s = sum(self._tokens) / elapsed_s
        return Speed(
            step_s=elapsed_s / len(self._durations_s),
            tokens_per_s=tokens_per_s,
            mfu_fraction=derive_mfu(tokens_per_s, self._flops_per_token, self._peak_flops),
            eta_s=steps_left * statistics.median(self._durations_s),
        )
