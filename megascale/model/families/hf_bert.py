"""Weights to and from BertForPreTraining and BertForMaskedLM of transformers, by the names in their files.

What differs: queries, keys and values come there apart; the vocabulary is padded here. A tied head has no matrix of its
own on either side, but its bias has one name here and is stored under one of their two.
"""

import torch
import torch.nn.functional as F

from megascale.config.model import ModelConfig
from megascale.model.families.hf_exchange import Exchange, fuse_qkv, split_qkv

HF_BLOCK = {
    "attention.qkv": "attention.self.{part}",
    "attention.output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "feed_forward.up": "intermediate.dense",
    "feed_forward.output": "output.dense",
    "feed_forward_norm": "output.LayerNorm",
}
"""Our layer within a block -> theirs."""
HF_OTHERS = {
    "embedding.tokens": "bert.embeddings.word_embeddings",
    "embedding.positions": "bert.embeddings.position_embeddings",
    "embedding.segments": "bert.embeddings.token_type_embeddings",
    "embedding.norm": "bert.embeddings.LayerNorm",
    "head": "cls.predictions.decoder",
    "head.transform": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
    "head.pairs.pooler": "bert.pooler.dense",
    "head.pairs.classes": "cls.seq_relationship",
}
"""Our layer -> theirs."""
HF_BIAS, HF_DECODER_BIAS = "cls.predictions.bias", "cls.predictions.decoder.bias"
"""The head's bias. In a tied model they are one tensor, stored under the first name; else the second is what counts."""


def bert_exchange(config: ModelConfig, name: str) -> Exchange:
    """How the parameter with this global name is exchanged."""
    layer, _, kind = name.rpartition(".")
    if layer.startswith("blocks."):
        return _block_exchange(config, layer, kind)
    hf_name = HF_BIAS if name == "head.bias" else f"{HF_OTHERS[layer]}.{kind}"
    if name == "head.bias" and not config.is_tied:
        return Exchange(
            (HF_BIAS, HF_DECODER_BIAS), lambda t: (t[: config.vocab_size],) * 2, lambda _, t: _padded(config, t)
        )
    if layer in ("embedding.tokens", "head"):
        return Exchange((hf_name,), lambda t: (t[: config.vocab_size],), lambda t: _padded(config, t))
    return Exchange((hf_name,), lambda t: (t,), lambda t: t)


def _block_exchange(config: ModelConfig, layer: str, kind: str) -> Exchange:
    _, block, layer = layer.split(".", 2)
    hf_name = f"bert.encoder.layer.{block}.{HF_BLOCK[layer]}.{kind}"
    if layer != "attention.qkv":
        return Exchange((hf_name,), lambda t: (t,), lambda t: t)
    parts = tuple(hf_name.format(part=part) for part in ("query", "key", "value"))
    return Exchange(parts, lambda t: split_qkv(config, t), lambda *qkv: fuse_qkv(config, *qkv))


def _padded(config: ModelConfig, tensor: torch.Tensor) -> torch.Tensor:
    """Zeros for the ids that pad the vocabulary."""
    num_padding = config.padded_vocab_size - config.vocab_size
    return F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, num_padding))
