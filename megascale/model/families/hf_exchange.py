"""How one parameter becomes tensors of Hugging Face's, and back: what all families' tables of names are made of.

Legend: K kv heads, G query heads per group, C head_dim, D d_model.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from megascale.config.model import ModelConfig


class Exchange(NamedTuple):
    """How one of our tensors becomes one or more of theirs, and back."""

    hf_names: tuple[str, ...]
    split: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
    fuse: Callable[..., torch.Tensor]


def transpose_matrix(tensor: torch.Tensor) -> torch.Tensor:
    """The transpose of a matrix; a vector as it is."""
    return tensor.T if tensor.dim() == 2 else tensor


def split_qkv(config: ModelConfig, fused: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of a fused weight (K (G + 2) C, D) or bias, each with its heads in order."""
    group_size = config.num_heads // config.kv_heads
    grouped = fused.unflatten(0, (config.kv_heads, group_size + 2, config.head_dim))
    return tuple(part.flatten(0, 2) for part in grouped.split((group_size, 1, 1), dim=1))


def fuse_qkv(config: ModelConfig, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The inverse of `split_qkv`."""
    grouped = [part.unflatten(0, (config.kv_heads, -1, config.head_dim)) for part in (q, k, v)]
    return torch.cat(grouped, dim=1).flatten(0, 2)
