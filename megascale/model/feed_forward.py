"""The position-wise layers between attentions, their inner features cut over tp.

Shapes: B rows, T positions, D d_model, F d_ff.
"""

import torch
import torch.nn.functional as F
from torch import nn

from megascale.config.model import ModelConfig
from megascale.model.axes import Axes
from megascale.model.linear import ColumnLinear, RowLinear


class GeluFeedForward(nn.Module):
    """Two linear layers with GELU, in its tanh form, between them.

    Shape: (B, T, D) to (B, T, D).
    Source: Hendrycks and Gimpel 2016; the form of GPT-2.
    """

    def __init__(self, config: ModelConfig, axes: Axes):
        super().__init__()
        self.up = ColumnLinear(config.d_model, config.ffn_dim, bias=config.has_bias, axes=axes)
        self.output = RowLinear(config.ffn_dim, config.d_model, bias=config.has_bias, axes=axes)

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        return self.output(F.gelu(self.up(hidden_BTD), approximate="tanh"))


class SwiGluFeedForward(nn.Module):
    """silu(gate) * up, projected back; gate and up come from one product with a weight stacked as (2, F, D).

    Shape: (B, T, D) to (B, T, D).
    Source: Shazeer 2020, section 2.
    """

    def __init__(self, config: ModelConfig, axes: Axes):
        super().__init__()
        self.gate_up = ColumnLinear(config.d_model, 2, config.ffn_dim, bias=config.has_bias, axes=axes)
        self.output = RowLinear(config.ffn_dim, config.d_model, bias=config.has_bias, axes=axes)

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        gate_BTF, up_BTF = self.gate_up(hidden_BTD).chunk(2, dim=-1)
        return self.output(F.silu(gate_BTF) * up_BTF)
