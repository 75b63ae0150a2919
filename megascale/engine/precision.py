"""Number formats of the forward pass, and the fp16 loss scale."""

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler, LossScalerBase

TORCH_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

MIN_LOSS_SCALE = 1.0
"""An fp16 overflow at this scale is no longer cured by scaling: the value itself isn't finite."""

SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def build_loss_scaler(dtype: str, initial_log2: int, window_steps: int) -> LossScalerBase:
    """The dynamic loss scaler of fp16, halving at each overflow; a scale of 1 in other formats.

    Source: Micikevicius et al., Mixed Precision Training, arXiv 1710.03740, section 3.2.
    """
    if dtype != "fp16":
        return LossScaler(scale=1.0)
    return DynamicLossScaler(
        init_scale=2.0**initial_log2, scale_window=window_steps, min_scale=MIN_LOSS_SCALE, delayed_shift=1,
        consecutive_hysteresis=False, raise_error_at_min_scale=False,
    )


def scaler_values(scaler: LossScalerBase) -> dict[str, float]:
    """The scaler's state as plain numbers; empty when it has none."""
    return {f"loss_scaler.{name}": getattr(scaler, name) for name in SCALER_FIELDS if scaler.dynamic}


def restore_scaler(scaler: LossScalerBase, values: dict[str, float]) -> None:
    """Puts back what `scaler_values` gave; values of a format without a scale let the scaler begin as in a new run."""
    has_values = any(f"loss_scaler.{name}" in values for name in SCALER_FIELDS)
    for name in SCALER_FIELDS if scaler.dynamic and has_values else ():
        kind = type(getattr(scaler, name))
        setattr(scaler, name, kind(values[f"loss_scaler.{name}"]))
