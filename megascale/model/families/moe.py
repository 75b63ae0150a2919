"""Mixture of experts: a LLaMA in which a router sends each token to some of many feed-forward layers.

Which blocks are sparse, how many experts there are and how they are kept in balance is `model.moe`. Switch has the best
one (Fedus et al. 2021), GLaM and Mixtral the best two (Du et al. 2022, Jiang et al. 2024), DeepSeekMoE many narrow ones
beside those that see every token (Dai et al. 2024).
"""

from torch import nn

from megascale.config.model import ModelConfig
from megascale.model.axes import Axes
from megascale.model.block import Block
from megascale.model.families import decoder
from megascale.model.layers import LayerSpec
from megascale.model.moe.layer import MoeLayer


def layer_specs(config: ModelConfig, axes: Axes) -> list[LayerSpec]:
    """The layers of a decoder-only model with experts, first to last."""
    return decoder.layer_specs(config, axes, build_block)


def build_block(config: ModelConfig, name: str, axes: Axes) -> nn.Module:
    """The block of this name, sparse or dense."""
    is_sparse = int(name.rpartition(".")[2]) in config.sparse_blocks
    return Block(config, name, axes, MoeLayer(config, axes) if is_sparse else None)
