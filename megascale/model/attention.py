"""Self-attention with grouped key-value heads, its heads cut over tp.

Shapes: B rows, T positions, D d_model, H query heads, K kv heads, G = H / K query heads per group, C head_dim; heads
are those of this rank.
"""

import torch
from torch import nn

from megascale.config.model import ModelConfig
from megascale.model.attention_core import Scoring, attend
from megascale.model.axes import Axes
from megascale.model.context import Context
from megascale.model.linear import ColumnLinear, RowLinear
from megascale.model.mup import score_scale
from megascale.model.norm import RMSNorm
from megascale.model.rope import rotate
from megascale.parallel.collectives import gather


class Attention(nn.Module):
    """Mixes positions: each reads those that it may see, weighted by softmax(q k / sqrt(C)).

    One fused product gives queries, keys and values. Its rows are grouped as (K, G + 2, C): the query heads of a group,
    then their key and value head. A cut between groups leaves whole heads on both sides. With more tp ranks than kv
    heads the cut goes through groups: the ranks of a group gather its product and each takes its own query heads, so
    that no parameter is on two ranks.

    With `qk_norm` queries and keys are normalised in each head, by two norms that all heads share.

    Shape: (B, T, D) to (B, T, D).
    Cost: as its linear layers; the gather moves (G + 2) C numbers per position and is reduce-scattered in backward.
    Source: Vaswani et al. 2017; Ainslie et al. 2023 (GQA); norms: Dehghani et al. 2023, arXiv 2302.05442, section 2.
    """

    def __init__(self, config: ModelConfig, name: str, axes: Axes):
        """`name` is that of its block, which ends with the block's number."""
        super().__init__()
        self.name, self.axes = name, axes
        self.group_size = config.num_heads // config.kv_heads
        self.head_dim = config.head_dim
        qkv_dim = (config.num_heads + 2 * config.kv_heads) * config.head_dim
        self.qkv = ColumnLinear(config.d_model, qkv_dim, bias=config.has_bias, axes=axes)
        self.output = RowLinear(config.heads_dim, config.d_model, bias=config.has_bias, axes=axes)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.scoring = Scoring(score_scale(config), config.attention_softcap)
        number = int(name.rpartition(".")[2]) + 1
        self.is_global = config.global_every is not None and number % config.global_every == 0

    def forward(self, hidden_BTD: torch.Tensor, context: Context) -> torch.Tensor:
        q_BTHC, k_BTKC, v_BTKC = self.split_heads(self.qkv(hidden_BTD))
        if self.q_norm is not None:
            q_BTHC, k_BTKC = self.q_norm(q_BTHC), self.k_norm(k_BTKC)
        if context.cos_BA1C is not None:
            q_BTHC = rotate(q_BTHC, context.cos_BA1C, context.sin_BA1C)
            k_BTKC = rotate(k_BTKC, context.cos_BA1C, context.sin_BA1C)
        if context.cache is not None:
            k_BTKC, v_BTKC = context.cache.extend(self.name, k_BTKC, v_BTKC)
        mask = context.global_mask if self.is_global else context.mask
        mixed_BTHC = attend(q_BTHC, k_BTKC, v_BTKC, mask, self.axes, self.scoring_of(context, k_BTKC.shape[1]))
        return self.output(mixed_BTHC.flatten(2))

    def scoring_of(self, context: Context, num_keys: int) -> Scoring:
        """How this micro-batch's queries and keys become scores."""
        return self.scoring

    def split_heads(self, fused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value heads of this rank from the fused product's features."""
        kv = self.axes.kv
        grouped = gather(fused, kv, 2).unflatten(-1, (-1, self.group_size + 2, self.head_dim))
        q_BTKGC, k_BTK1C, v_BTK1C = grouped.split((self.group_size, 1, 1), dim=3)
        if kv.size > 1:
            q_BTKGC = q_BTKGC.chunk(kv.size, dim=3)[kv.rank]
        return q_BTKGC.flatten(2, 3), k_BTK1C.flatten(2, 3), v_BTK1C.flatten(2, 3)
