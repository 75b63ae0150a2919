"""T5's weights to and from T5ForConditionalGeneration's names: queries, keys and values are apart there.

The bias of a stack stands there in the stack's first block. Legend: H heads, C head_dim.
"""

import torch
import torch.nn.functional as F

from megascale.config.model import ModelConfig
from megascale.model.families.hf_exchange import Exchange, fuse_qkv, split_qkv

WHOLE = {
    "embedding.tokens": "shared",
    "head": "lm_head",
    "encoder.final_norm": "encoder.final_layer_norm",
    "decoder.final_norm": "decoder.final_layer_norm",
    "encoder.relative_bias": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "decoder.relative_bias": "decoder.block.0.layer.0.SelfAttention.relative_attention_bias",
}
"""Our layers outside of blocks -> theirs."""
IN_BLOCK = {
    "attention_norm": ("layer.0.layer_norm",),
    "attention.qkv": tuple(f"layer.0.SelfAttention.{part}" for part in "qkv"),
    "attention.output": ("layer.0.SelfAttention.o",),
    "cross_norm": ("layer.1.layer_norm",),
    "cross_attention.query": ("layer.1.EncDecAttention.q",),
    "cross_attention.key_value": ("layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v"),
    "cross_attention.output": ("layer.1.EncDecAttention.o",),
    "feed_forward_norm": ("layer.{last}.layer_norm",),
    "feed_forward.up": ("layer.{last}.DenseReluDense.wi",),
    "feed_forward.gate_up": ("layer.{last}.DenseReluDense.wi_0", "layer.{last}.DenseReluDense.wi_1"),
    "feed_forward.output": ("layer.{last}.DenseReluDense.wo",),
}
"""Our layers in blocks -> theirs; the feed-forward layer is `last` of two in the encoder, of three in the decoder."""


def t5_exchange(config: ModelConfig, name: str) -> Exchange:
    """How the parameter with this global name is exchanged."""
    layer = name.removesuffix(".weight")
    if layer in WHOLE:
        hf_names = (f"{WHOLE[layer]}.weight",)
        if layer not in ("embedding.tokens", "head"):
            return Exchange(hf_names, lambda t: (t,), lambda t: t)
        num_padding = config.padded_vocab_size - config.vocab_size
        return Exchange(hf_names, lambda t: (t[: config.vocab_size],), lambda t: F.pad(t, (0, 0, 0, num_padding)))
    stack, _, block, layer = layer.split(".", 3)
    last = 1 if stack == "encoder" else 2
    hf_names = tuple(f"{stack}.block.{block}.{part.format(last=last)}.weight" for part in IN_BLOCK[layer])
    if layer == "attention.qkv":
        return Exchange(hf_names, lambda t: split_qkv(config, t), lambda *qkv: fuse_qkv(config, *qkv))
    if layer == "cross_attention.key_value":
        return Exchange(hf_names, lambda t: split_key_value(config, t), lambda *kv: fuse_key_value(config, *kv))
    if layer == "feed_forward.gate_up":
        return Exchange(hf_names, lambda t: t.unbind(0), lambda *halves: torch.stack(halves))
    return Exchange(hf_names, lambda t: (t,), lambda t: t)


def split_key_value(config: ModelConfig, fused: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Keys and values of a fused weight (2 H C, D) in rows of (H, 2, C), each with its heads in order."""
    grouped = fused.unflatten(0, (config.num_heads, 2, config.head_dim))
    return tuple(part.flatten(0, 1) for part in grouped.unbind(1))


def fuse_key_value(config: ModelConfig, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The inverse of `split_key_value`."""
    return torch.stack([part.unflatten(0, (-1, config.head_dim)) for part in (k, v)], dim=1).flatten(0, 2)
