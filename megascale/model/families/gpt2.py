"""GPT-2: LayerNorm, learned positions, GELU, biases, a head tied to the embedding (Radford et al. 2019)."""

from functools import partial

from megascale.config.model import ModelConfig
from megascale.model.axes import Axes
from megascale.model.block import Block
from megascale.model.embedding import Embedding
from megascale.model.feed_forward import GeluFeedForward
from megascale.model.head import Head
from megascale.model.layers import LayerSpec
from megascale.model.norm import LayerNorm


def layer_specs(config: ModelConfig, axes: Axes) -> list[LayerSpec]:
    """The layers of a GPT-2, first to last."""
    build_norm = partial(LayerNorm, config.d_model, config.norm_eps, bias=config.has_bias)

    def build_block(name: str) -> Block:
        return Block(config, name, build_norm(), build_norm(), GeluFeedForward(config, axes), axes)

    names = [f"blocks.{index}" for index in range(config.num_layers)]
    tied = {"weight": "embedding.tokens.weight"} if config.is_tied else {}
    return [
        LayerSpec("embedding", partial(Embedding, config, has_positions=True, axes=axes)),
        *(LayerSpec(name, partial(build_block, name)) for name in names),
        LayerSpec("final_norm", build_norm),
        LayerSpec("head", partial(Head, config, axes), tied),
    ]
