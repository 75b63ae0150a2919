"""T5, and the transformer that it came from: an encoder that sees a whole text, and a decoder that reads it.

T5 has RMSNorm before each half, a bias on scores by distance shared by the blocks of a stack, ReLU or a gated GELU
(version 1.1), and no biases (Raffel et al. 2020). The original has LayerNorm after each sum, sines for positions, ReLU
and biases (Vaswani et al. 2017). Both share one embedding between the stacks and, unless told otherwise, the head.
"""

from functools import partial

from megascale.config.model import ModelConfig
from megascale.model.axes import Axes
from megascale.model.encoder_decoder import (
    DecoderBlock,
    EncoderBlock,
    PairEmbedding,
    PairHead,
    PostNormDecoderBlock,
    PostNormEncoderBlock,
    StackNorm,
)
from megascale.model.layers import LayerSpec
from megascale.model.relative_bias import RelativeBias

STACKS = ("encoder", "decoder")


def layer_specs(config: ModelConfig, axes: Axes) -> list[LayerSpec]:
    """The layers of an encoder-decoder, first to last."""
    is_post = config.traits.order == "post"
    blocks = {
        "encoder": (PostNormEncoderBlock if is_post else EncoderBlock, config.num_layers),
        "decoder": (PostNormDecoderBlock if is_post else DecoderBlock, config.decoder_layers),
    }
    specs = [LayerSpec("embedding", partial(PairEmbedding, config, axes))]
    for stack, (block, count) in blocks.items():
        names = [f"{stack}.blocks.{index}" for index in range(count)]
        specs += [LayerSpec(name, partial(block, config, name, axes), bias_of(config, stack)) for name in names]
        if not is_post:
            name = f"{stack}.final_norm"
            specs.append(LayerSpec(name, partial(StackNorm, config, name, is_encoder=stack == "encoder")))
    tied = {"weight": "embedding.tokens.weight"} if config.is_tied else {}
    return [*specs, LayerSpec("head", partial(PairHead, config, axes), tied)]


def shared_specs(config: ModelConfig, axes: Axes) -> list[LayerSpec]:
    """The bias of each stack of T5, which every rank of a pipeline holds."""
    if config.traits.positions != "relative":
        return []
    return [
        LayerSpec(f"{stack}.relative_bias", partial(RelativeBias, config, axes, is_causal=stack == "decoder"))
        for stack in STACKS
    ]


def bias_of(config: ModelConfig, stack: str) -> dict[str, str]:
    """How a block of a stack is tied to the stack's bias."""
    if config.traits.positions != "relative":
        return {}
    return {"attention.relative_bias.weight": f"{stack}.relative_bias.weight"}
