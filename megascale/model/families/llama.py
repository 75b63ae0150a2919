"""LLaMA: RMSNorm, rotary positions, SwiGLU, grouped-query attention, no biases (Touvron et al. 2023)."""

from functools import partial

from megascale.config.model import ModelConfig
from megascale.model.axes import Axes
from megascale.model.block import Block
from megascale.model.embedding import Embedding
from megascale.model.feed_forward import SwiGluFeedForward
from megascale.model.head import Head
from megascale.model.layers import LayerSpec
from megascale.model.norm import RMSNorm


def layer_specs(config: ModelConfig, axes: Axes) -> list[LayerSpec]:
    """The layers of a LLaMA, first to last."""
    build_norm = partial(RMSNorm, config.d_model, config.norm_eps)

    def build_block(name: str) -> Block:
        return Block(config, name, build_norm(), build_norm(), SwiGluFeedForward(config, axes), axes)

    names = [f"blocks.{index}" for index in range(config.num_layers)]
    tied = {"weight": "embedding.tokens.weight"} if config.is_tied else {}
    return [
        LayerSpec("embedding", partial(Embedding, config, has_positions=False, axes=axes)),
        *(LayerSpec(name, partial(build_block, name)) for name in names),
        LayerSpec("final_norm", build_norm),
        LayerSpec("head", partial(Head, config, axes), tied),
    ]
