"""The two norms of the families. Both compute in fp32 inside, whatever the dtype of their input.

A norm takes a context, and ignores it, so that it can stand in the list of layers by itself.
Shapes: B rows, T positions, D d_model.
"""

import torch
import torch.nn.functional as F
from torch import nn

from megascale.config.model import ModelConfig
from megascale.model.context import Context


class LayerNorm(nn.Module):
    """Subtracts the mean, divides by the standard deviation, scales and shifts.

    Source: Ba et al. 2016.
    """

    def __init__(self, d_model: int, eps: float, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_model))
        self.bias = nn.Parameter(torch.empty(d_model)) if bias else None
        self.eps = eps

    def forward(self, hidden_BTD: torch.Tensor, context: Context | None = None) -> torch.Tensor:
        return F.layer_norm(hidden_BTD, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """Divides by the root mean square, and scales.

    Source: Zhang and Sennrich 2019.
    """

    def __init__(self, d_model: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_model))
        self.eps = eps

    def forward(self, hidden_BTD: torch.Tensor, context: Context | None = None) -> torch.Tensor:
        return F.rms_norm(hidden_BTD, self.weight.shape, self.weight, self.eps)


def build_norm(config: ModelConfig) -> nn.Module:
    """The norm of a family, over the residual stream."""
    if config.traits.norm == "rms":
        return RMSNorm(config.d_model, config.norm_eps)
    return LayerNorm(config.d_model, config.norm_eps, bias=config.has_bias)
