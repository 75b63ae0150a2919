"""Relative position bias: what the distance from a query to a key adds to its score in each head.

Shapes: T queries, S keys, H heads of this rank, N buckets.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from megascale.config.model import ModelConfig
from megascale.model.axes import Axes


class RelativeBias(nn.Module):
    """One number per bucket of distances and head. All blocks of a stack use the same table; its heads are cut over tp.

    Each block looks its bias up by itself, so that a stage of a pipeline and a recomputed block need nothing from
    others; the gradients of all uses add up.

    Shape: (T,) and (S,) int64 columns to (H, T, S).
    Cost: a look-up of H T S numbers in each block, which stay for the backward pass, as scores do under a bias.
    Source: Raffel et al. 2020, section 2.1.
    """

    def __init__(self, config: ModelConfig, axes: Axes, is_causal: bool):
        super().__init__()
        self.is_causal, self.max_distance = is_causal, config.relative_max_distance
        self.weight = nn.Parameter(torch.empty(config.relative_buckets, config.num_heads // axes.tp.size))

    def forward(self, query_columns_T: torch.Tensor, key_columns_S: torch.Tensor) -> torch.Tensor:
        offset_TS = key_columns_S - query_columns_T[:, None]
        bucket_TS = relative_bucket(offset_TS, len(self.weight), self.max_distance, is_causal=self.is_causal)
        return F.embedding(bucket_TS, self.weight).permute(2, 0, 1)


def relative_bucket(
    offset: torch.Tensor, num_buckets: int, max_distance: int, *, is_causal: bool
) -> torch.Tensor:
    """The bucket of each offset, that is key position minus query position.

    Where a query sees both ways, half of the buckets are for keys behind it. Of each way one half of the buckets is for
    a distance each, the others grow by a constant factor up to `max_distance`, and the last takes all beyond it.

    Shape: any, int64, to the same with values below `num_buckets`.
    """
    if is_causal:
        first, distance = torch.zeros_like(offset), (-offset).clamp(min=0)
    else:
        num_buckets //= 2
        first, distance = (offset > 0) * num_buckets, offset.abs()
    num_exact = num_buckets // 2
    growth = torch.log(distance.clamp(min=1).float() / num_exact) / math.log(max_distance / num_exact)
    far = num_exact + (growth * (num_buckets - num_exact)).long()
    return first + torch.where(distance < num_exact, distance, far.clamp(max=num_buckets - 1))
