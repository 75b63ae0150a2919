"""Which state an optimizer keeps of each parameter: one table, that engine, checkpoints and import read.

Elements of a kind in `element` are as many as the parameter's and lie where these lie. `row` and `column` are what
Adafactor keeps of a matrix: the parameter's shape without its last dim, and without the one before.
"""

from collections.abc import Sequence
from math import prod

import torch

from megascale.config.optimizer import OptimizerConfig, OptimizerKind

EMA = "ema"
"""Kind of the averaged weights."""
FACTORS = {"row": -1, "column": -2}
"""Kind of a factor -> the dim of the matrix that it lacks."""
ADAMW_KINDS = ("exp_avg", "exp_avg_sq")
ELEMENT_KINDS: dict[tuple[OptimizerKind, bool], tuple[str, ...]] = {
    ("adamw", False): ADAMW_KINDS,
    ("lion", False): ("exp_avg",),
    ("muon", True): ("momentum",),
    ("muon", False): ADAMW_KINDS,
    ("adafactor", True): (),
    ("adafactor", False): ("exp_avg_sq",),
}
"""(optimizer, whether it treats the parameter as a matrix) -> element-wise state."""


def element_kinds(config: OptimizerConfig, is_matrix: bool) -> tuple[str, ...]:
    """Element-wise kinds of state of a parameter, the average of its weights among them."""
    return ELEMENT_KINDS[config.kind, is_matrix] + ((EMA,) if config.ema_decay is not None else ())


def state_shapes(config: OptimizerConfig, shape: Sequence[int], is_matrix: bool) -> dict[str, tuple[int, ...]]:
    """The shape of each kind of state of an unsharded parameter, the master weights apart."""
    shapes = dict.fromkeys(element_kinds(config, is_matrix), tuple(shape))
    if config.kind == "adafactor" and is_matrix:
        shapes |= {kind: factor_shape(shape, kind) for kind in FACTORS}
    return shapes


def state_elements(config: OptimizerConfig, shape: Sequence[int], is_matrix: bool) -> int:
    """Elements of fp32 state of an unsharded parameter, the master weights apart."""
    return sum(map(prod, state_shapes(config, shape, is_matrix).values()))


def factor_shape(shape: Sequence[int], kind: str) -> tuple[int, ...]:
    """The shape of a factor of a matrix, or of each matrix of a stack."""
    return tuple(size for dim, size in enumerate(shape, start=-len(shape)) if dim != FACTORS[kind])


def new_factors(shape: Sequence[int], gradient: torch.Tensor) -> dict[str, torch.Tensor]:
    """Factors of a matrix, or of each matrix of a stack, before the first step; where and in what its gradient is."""
    return {kind: gradient.new_zeros(factor_shape(shape, kind)) for kind in FACTORS}


def new_state(part: torch.Tensor, kinds: Sequence[str], device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """State of a part of the parameters before the first step: zeros, and the weights for their own average.

    Args:
        part: elements of fp32 weights.
        device: of the number of steps.
    """
    states = {kind: torch.zeros_like(part, requires_grad=False) for kind in kinds}
    if EMA in kinds:
        states[EMA].copy_(part.detach())
    return {"step": torch.zeros((), device=device), **states}
