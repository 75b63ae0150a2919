"""The position-wise layers between attentions, their inner features cut over tp.

Blocks give them the context too, of which only sparse ones (`megascale/model/moe/`) have any use.

Shapes: B rows, T positions, D d_model, F d_ff.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from megascale.config.model import ModelConfig
from megascale.model.axes import Axes
from megascale.model.context import Context
from megascale.model.linear import ColumnLinear, RowLinear

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "swiglu": F.silu,
    "geglu": partial(F.gelu, approximate="tanh"),
}
"""What is applied to the one product, or with a gate to the first of two. T5's gate has the tanh form, too."""


class FeedForward(nn.Module):
    """Two linear layers with an activation between them.

    Shape: (B, T, D) to (B, T, D).
    Source: Vaswani et al. 2017, section 3.3; GELU: Hendrycks and Gimpel 2016.
    """

    def __init__(self, config: ModelConfig, d_ff: int, axes: Axes):
        super().__init__()
        self.activation = ACTIVATIONS[config.feed_forward]
        self.up = ColumnLinear(config.d_model, d_ff, bias=config.has_bias, axes=axes)
        self.output = RowLinear(d_ff, config.d_model, bias=config.has_bias, axes=axes)

    def forward(self, hidden_BTD: torch.Tensor, context: Context | None = None) -> torch.Tensor:
        return self.output(self.activation(self.up(hidden_BTD)))


class GatedFeedForward(nn.Module):
    """activation(gate) * up, projected back; gate and up come from one product with a weight stacked as (2, F, D).

    Shape: (B, T, D) to (B, T, D).
    Source: Shazeer 2020, section 2.
    """

    def __init__(self, config: ModelConfig, d_ff: int, axes: Axes):
        super().__init__()
        self.activation = ACTIVATIONS[config.feed_forward]
        self.gate_up = ColumnLinear(config.d_model, 2, d_ff, bias=config.has_bias, axes=axes)
        self.output = RowLinear(d_ff, config.d_model, bias=config.has_bias, axes=axes)

    def forward(self, hidden_BTD: torch.Tensor, context: Context | None = None) -> torch.Tensor:
        gate_BTF, up_BTF = self.gate_up(hidden_BTD).chunk(2, dim=-1)
        return self.output(self.activation(gate_BTF) * up_BTF)


def build_feed_forward(config: ModelConfig, axes: Axes, d_ff: int | None = None) -> nn.Module:
    """The feed-forward layer of a family; `d_ff` features wide, or as the config says."""
    layer = GatedFeedForward if config.is_gated else FeedForward
    return layer(config, d_ff or config.ffn_dim, axes)
