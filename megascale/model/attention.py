"""Causal self-attention with grouped key-value heads.

Shapes: B rows, T positions, D d_model, H query heads, K kv heads, G = H / K query heads per group, C head_dim.
"""

import torch
import torch.nn.functional as F
from torch import nn

from megascale.config.model import ModelConfig
from megascale.model.context import Context
from megascale.model.linear import Linear
from megascale.model.rope import rotate


class Attention(nn.Module):
    """Mixes positions: each reads those before it, weighted by softmax(q k / sqrt(C)).

    One fused product gives queries, keys and values. Its rows are grouped as (K, G + 2, C): the query heads of a group,
    then their key and value head. A cut between groups leaves whole heads on both sides.

    Shape: (B, T, D) to (B, T, D).
    Source: Vaswani et al. 2017; Ainslie et al. 2023 (GQA).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.group_size = config.num_heads // config.kv_heads
        self.head_dim = config.head_dim
        qkv_dim = (config.num_heads + 2 * config.kv_heads) * config.head_dim
        self.qkv = Linear(config.d_model, qkv_dim, bias=config.has_bias)
        self.output = Linear(config.d_model, config.d_model, bias=config.has_bias)

    def forward(self, hidden_BTD: torch.Tensor, context: Context) -> torch.Tensor:
        grouped = self.qkv(hidden_BTD).unflatten(-1, (-1, self.group_size + 2, self.head_dim))
        q_BTHC, k_BTKC, v_BTKC = (part.flatten(2, 3) for part in grouped.split((self.group_size, 1, 1), dim=3))
        if context.cos_BT1C is not None:
            q_BTHC = rotate(q_BTHC, context.cos_BT1C, context.sin_BT1C)
            k_BTKC = rotate(k_BTKC, context.cos_BT1C, context.sin_BT1C)
        mixed_BHTC = F.scaled_dot_product_attention(
            q_BTHC.transpose(1, 2),
            k_BTKC.transpose(1, 2),
            v_BTKC.transpose(1, 2),
            is_causal=True,
            enable_gqa=self.group_size > 1,
        )
        return self.output(mixed_BHTC.transpose(1, 2).flatten(2))
