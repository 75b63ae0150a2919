"""Attention of a decoder to an encoder's output, its heads cut over tp.

Shapes: B rows, T positions of the decoder, S of the encoder, D d_model, H heads, C head_dim; heads are those of this
rank.
"""

import torch
from torch import nn

from megascale.config.model import ModelConfig
from megascale.model.attention_core import PLAIN, Scoring, attend
from megascale.model.axes import Axes
from megascale.model.context import Context
from megascale.model.linear import ColumnLinear, RowLinear


class CrossAttention(nn.Module):
    """Each position of the decoder reads those of the encoder that `context.cross_mask` lets it see.

    The rows of the fused product of keys and values are grouped as (H, 2, C), so that a cut over tp leaves whole heads.
    With sequence shards each stack is gathered by itself.

    Shape: (B, T, D) and (B, S, D) to (B, T, D).
    Source: Vaswani et al. 2017, section 3.2.3.
    """

    def __init__(self, config: ModelConfig, name: str, axes: Axes, scoring: Scoring = PLAIN):
        """`name` is that of its block; `scoring` how queries and keys become scores."""
        super().__init__()
        self.name, self.axes, self.scoring, self.head_dim = name, axes, scoring, config.head_dim
        self.query = ColumnLinear(config.d_model, config.heads_dim, bias=config.has_bias, axes=axes)
        self.key_value = ColumnLinear(config.d_model, 2 * config.heads_dim, bias=config.has_bias, axes=axes)
        self.output = RowLinear(config.heads_dim, config.d_model, bias=config.has_bias, axes=axes)

    def forward(self, hidden_BTD: torch.Tensor, source_BSD: torch.Tensor, context: Context) -> torch.Tensor:
        q_BTHC = self.query(hidden_BTD).unflatten(-1, (-1, self.head_dim))
        if context.cache is None:
            k_BSHC, v_BSHC = self.keys_values(source_BSD)
        else:
            k_BSHC, v_BSHC = context.cache.fixed(self.name, lambda: self.keys_values(source_BSD))
        mixed_BTHC = attend(q_BTHC, k_BSHC, v_BSHC, context.cross_mask, self.axes, self.scoring)
        return self.output(mixed_BTHC.flatten(2))

    def keys_values(self, source_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the encoder's output, (B, S, H, C) each: the same for every position of the decoder."""
        return self.key_value(source_BSD).unflatten(-1, (-1, 2, self.head_dim)).unbind(-2)
