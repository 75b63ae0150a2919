"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from math import cos, pi, sqrt
from typing import Literal

ScheduleKind = Literal["constant", "linear", "cosine", "wsd"]


def learning_rate(
    step: int,
    *,
    kind: ScheduleKind,
    peak: float,
    horizon_steps: int,
    warmup_steps: int = 0,
    decay_steps: int = 0,
    min_fraction: float = 0.0,
) -> float:
    """The learning rate of the optimizer step with this number, counted from 0.

    Warm-up rises linearly and never gives 0: step 0 has peak / warmup_steps, step warmup_steps - 1 the peak. Then

    - constant: the peak;
    - linear, cosine: from the peak at step `warmup_steps` down to the floor at step `horizon_steps`
      (cosine: Loshchilov and Hutter 2017, equation 5, without restarts);
    - wsd: the peak until `decay_steps` before the horizon, then down as 1 - sqrt (warm-up, stable, decay: Hu et al.
      2024, MiniCPM; the shape: Haegele et al. 2024).

    The floor is `min_fraction` x peak. The horizon is the first step that is no longer part of the plan: a run of
    `horizon_steps` steps never quite gets to the floor, and one that goes on stays there.

    Units: as `peak`.
    """
    if step < warmup_steps:
        return peak * ((step + 1) / warmup_steps)
    if kind == "constant":
        return peak
    decay_start = max(warmup_steps, horizon_steps - decay_steps) if kind == "wsd" else warmup_steps
    if step < decay_start:
        return peak
    progress_fraction = (step - decay_start) / (horizon_steps - decay_start) if step < horizon_steps else 1.0
    return peak * (min_fraction + (1 - min_fraction) * remaining_fraction(kind, progress_fraction))


def remaining_fraction(kind: ScheduleKind, progress_fraction: float) -> float:
    """How much of the way from floor to peak is left, 1 at the start of the decay and 0 at its end."""
    if kind == "cosine":
        return (1 + cos(pi * progress_fraction)) / 2
    return 1 - (sqrt(progress_fraction) if kind == "wsd" else progress_fraction)
