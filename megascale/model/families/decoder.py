"""Decoder-only families: blocks of causal attention, one after the other.

GPT-2 has LayerNorm, learned positions, GELU, biases and a head tied to the embedding (Radford et al. 2019); LLaMA has
RMSNorm, rotary positions, SwiGLU, grouped-query attention and no biases (Touvron et al. 2023).
"""

from collections.abc import Callable
from functools import partial

from torch import nn

from megascale.config.model import ModelConfig
from megascale.model.axes import Axes
from megascale.model.block import Block
from megascale.model.embedding import Embedding
from megascale.model.head import Head
from megascale.model.layers import LayerSpec
from megascale.model.norm import build_norm


def layer_specs(
    config: ModelConfig, axes: Axes, block: Callable[[ModelConfig, str, Axes], nn.Module] = Block,
    head: Callable[[ModelConfig, Axes], nn.Module] = Head,
) -> list[LayerSpec]:
    """The layers of a decoder-only model, first to last; `block` makes a block of (config, its name, axes)."""
    names = [f"blocks.{index}" for index in range(config.num_layers)]
    tied = {"weight": "embedding.tokens.weight"} if config.is_tied else {}
    return [
        LayerSpec("embedding", partial(Embedding, config, axes)),
        *(LayerSpec(name, partial(block, config, name, axes)) for name in names),
        LayerSpec("final_norm", partial(build_norm, config)),
        LayerSpec("head", partial(head, config, axes), tied),
    ]
