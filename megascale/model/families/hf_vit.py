"""Weights to and from ViTForImageClassification and ViTMAEForPreTraining of transformers, by the names in their files.

What differs: queries, keys and values come there apart; the patch embedding is a convolution's kernel, and vectors of
one position have dims of length 1 before it; the classes are padded here. MAE stores its fixed sines, which are no
parameters here.
Legend: C colours, P side of a patch, D d_model.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from megascale.config.model import ModelConfig
from megascale.model.families.hf_exchange import Exchange, fuse_qkv, split_qkv
from megascale.model.mae_decoder import decoder_config

HF_BLOCK = {
    "attention_norm": "layernorm_before",
    "attention.qkv": "attention.attention.{part}",
    "attention.output": "attention.output.dense",
    "feed_forward_norm": "layernorm_after",
    "feed_forward.up": "intermediate.dense",
    "feed_forward.output": "output.dense",
}
"""Our layer within a block -> theirs."""
HF_OTHERS = {
    "embedding.patches": "vit.embeddings.patch_embeddings.projection",
    "embedding.positions.weight": "vit.embeddings.position_embeddings",
    "embedding.cls": "vit.embeddings.cls_token",
    "final_norm": "vit.layernorm",
    "head.weight": "classifier.weight",
    "head.bias": "classifier.bias",
    "head.embed": "decoder.decoder_embed",
    "head.mask_token": "decoder.mask_token",
    "head.norm": "decoder.decoder_norm",
    "head.predict": "decoder.decoder_pred",
}
"""Our layer or parameter -> theirs."""
ENCODER, DECODER = "vit.encoder.layer.{}.", "decoder.decoder_encoder.layer.{}."
HF_SINES = {"vit.embeddings.position_embeddings": "d_model", "decoder.decoder_pos_embed": "mae_decoder_width"}
"""Their tensors of MAE that are no parameters here, with the field that says how wide each is."""


def vit_exchange(config: ModelConfig, name: str) -> Exchange:
    """How the parameter with this global name is exchanged."""
    if "blocks." in name:
        return _block_exchange(config, name)
    layer, _, kind = name.rpartition(".")
    hf_name = HF_OTHERS.get(name) or f"{HF_OTHERS[layer]}.{kind}"
    if name == "embedding.patches.weight":
        vision = config.vision
        return _reshaped(hf_name, lambda t: t.unflatten(1, (vision.channels, vision.patch_size, vision.patch_size)))
    if name == "embedding.positions.weight":
        return _reshaped(hf_name, lambda t: t[None], lambda t: t[0])
    if name in ("embedding.cls", "head.mask_token"):
        return _reshaped(hf_name, lambda t: t[None, None], lambda t: t[0, 0])
    if name in ("head.weight", "head.bias"):
        num_padding = config.padded_vocab_size - config.vocab_size
        return _reshaped(
            hf_name, lambda t: t[: config.vocab_size], lambda t: F.pad(t, (0, 0) * (t.dim() - 1) + (0, num_padding))
        )
    return _reshaped(hf_name, lambda t: t, lambda t: t)


def _block_exchange(config: ModelConfig, name: str) -> Exchange:
    stack, _, rest = name.rpartition("blocks.")
    block, layer = rest.split(".", 1)
    layer, _, kind = layer.rpartition(".")
    start = (DECODER if stack else ENCODER).format(block)
    if layer != "attention.qkv":
        return _reshaped(f"{start}{HF_BLOCK[layer]}.{kind}", lambda t: t, lambda t: t)
    shape = decoder_config(config) if stack else config
    parts = tuple(f"{start}{HF_BLOCK[layer].format(part=part)}.{kind}" for part in ("query", "key", "value"))
    return Exchange(parts, lambda t: split_qkv(shape, t), lambda *qkv: fuse_qkv(shape, *qkv))


def _reshaped(
    hf_name: str, split: Callable[[torch.Tensor], torch.Tensor],
    fuse: Callable[[torch.Tensor], torch.Tensor] = lambda t: t.flatten(1),
) -> Exchange:
    """The exchange of a parameter that is one of their tensors in another form."""
    return Exchange((hf_name,), lambda t: (split(t),), fuse)
