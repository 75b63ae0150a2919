"""Which parameters are matrices to an optimizer, and which matrices are fused in one tensor."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch

from megascale.config.model import ModelConfig
from megascale.model.sharding import rule_of


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether the parameter's last two dims are a matrix: weights that decay, not stacked biases."""
    return len(shape) >= 2 and rule_of(name).decays


def is_hidden_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether it is a matrix of a block: no table, no patch embedding, no head.

    Source: Jordan 2024: Muon is for hidden layers; embeddings and head are optimized by AdamW.
    """
    return is_matrix(name, shape) and fnmatchcase(name, "*blocks.*") and not fnmatchcase(name, "*relative*")


def split_fused(name: str, tensor: torch.Tensor, model: ModelConfig) -> list[torch.Tensor]:
    """Views of the matrices that are fused in a whole weight: queries, keys and values; or the last two.

    What is stacked along a dim of its own, as gate and up are, or experts, needs no splitting.
    """
    kv_heads, group_size = model.kv_heads, model.num_heads // model.kv_heads
    if name.startswith("head."):  # the decoder of a masked autoencoder
        kv_heads, group_size = model.vision.mae_decoder_heads if model.vision else 1, 1
    if fnmatchcase(name, "*.qkv.weight"):
        sizes = (group_size, 1, 1)
    elif fnmatchcase(name, "*.key_value.weight"):
        sizes = (1, 1)
    else:
        return [tensor]
    grouped_KGCD = tensor.view(kv_heads, sum(sizes), -1, tensor.shape[-1])
    return list(grouped_KGCD.split(sizes, dim=1))
