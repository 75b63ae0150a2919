"""Weights to and from Hugging Face's names and layouts, as pure tensor rearrangements, for GPT-2 and LLaMA.

What differs: GPT-2's linear layers are stored there as (in, out); queries, keys and values come there one after the
other (GPT-2) or apart (LLaMA), here grouped by kv head; gate and up are apart there and stacked here; the vocabulary is
padded here. A tied head has no tensor of its own on either side.
Legend: K kv heads, G query heads per group, C head_dim, D d_model.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F

from megascale.config.model import ModelConfig
from megascale.model.families.hf_bert import bert_exchange
from megascale.model.families.hf_exchange import Exchange, fuse_qkv, split_qkv, transpose_matrix
from megascale.model.families.hf_mixtral import is_sparse_part, mixtral_exchange
from megascale.model.families.hf_t5 import t5_exchange
from megascale.model.families.hf_vit import vit_exchange

Tensors = Mapping[str, torch.Tensor]

HF_LAYERS = {
    "gpt2": {
        "embedding.tokens": "transformer.wte",
        "embedding.positions": "transformer.wpe",
        "attention_norm": "transformer.h.{block}.ln_1",
        "attention.qkv": "transformer.h.{block}.attn.c_attn",
        "attention.output": "transformer.h.{block}.attn.c_proj",
        "feed_forward_norm": "transformer.h.{block}.ln_2",
        "feed_forward.up": "transformer.h.{block}.mlp.c_fc",
        "feed_forward.output": "transformer.h.{block}.mlp.c_proj",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    },
    "llama": {
        "embedding.tokens": "model.embed_tokens",
        "attention_norm": "model.layers.{block}.input_layernorm",
        "attention.qkv": "model.layers.{block}.self_attn.{part}_proj",
        "attention.q_norm": "model.layers.{block}.self_attn.q_norm",
        "attention.k_norm": "model.layers.{block}.self_attn.k_norm",
        "attention.output": "model.layers.{block}.self_attn.o_proj",
        "feed_forward_norm": "model.layers.{block}.post_attention_layernorm",
        "feed_forward.gate_up": "model.layers.{block}.mlp.{part}_proj",
        "feed_forward.output": "model.layers.{block}.mlp.down_proj",
        "final_norm": "model.norm",
        "head": "lm_head",
    },
}
"""Family -> our layer (without `blocks.N.`) -> theirs; `{part}` where their layer is several."""
HF_PARTS = {"attention.qkv": ("q", "k", "v"), "feed_forward.gate_up": ("gate", "up")}


def to_hf(config: ModelConfig, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Our named parameters as those of GPT2LMHeadModel or LlamaForCausalLM; views of ours where possible."""
    converted = {}
    for name, tensor in tensors.items():
        exchange = exchange_of(config, name)
        converted.update(zip(exchange.hf_names, exchange.split(tensor), strict=True))
    return converted


def from_hf(config: ModelConfig, names: Iterable[str], hf_tensors: Tensors) -> dict[str, torch.Tensor]:
    """The inverse of `to_hf`, for our parameters of these names.

    Raises:
        KeyError: one of their tensors is missing.
    """
    exchanges = {name: exchange_of(config, name) for name in names}
    return {
        name: exchange.fuse(*(hf_tensors[hf_name] for hf_name in exchange.hf_names))
        for name, exchange in exchanges.items()
    }


def exchange_of(config: ModelConfig, name: str) -> Exchange:
    """How the parameter with this global name is exchanged."""
    if config.family == "bert":
        return bert_exchange(config, name)
    if config.family == "vit":
        return vit_exchange(config, name)
    if config.family == "t5":
        return t5_exchange(config, name)
    if is_sparse_part(name):
        return mixtral_exchange(config, name)
    family = "llama" if config.family == "moe" else config.family
    layer, _, kind = name.rpartition(".")
    block = ""
    if layer.startswith("blocks."):
        _, block, layer = layer.split(".", 2)
    hf_layer = HF_LAYERS[family][layer]
    parts = HF_PARTS.get(layer, ("",)) if "{part}" in hf_layer else ("",)
    hf_names = tuple(f"{hf_layer.format(block=block, part=part)}.{kind}" for part in parts)
    if layer in ("embedding.tokens", "head"):
        num_padding = config.padded_vocab_size - config.vocab_size
        return Exchange(hf_names, lambda t: (t[: config.vocab_size],), lambda t: F.pad(t, (0, 0, 0, num_padding)))
    if layer == "feed_forward.gate_up":
        return Exchange(hf_names, lambda t: t.unbind(0), lambda *halves: torch.stack(halves))
    if family == "llama":
        if layer == "attention.qkv":
            return Exchange(hf_names, lambda t: split_qkv(config, t), lambda *qkv: fuse_qkv(config, *qkv))
        return Exchange(hf_names, lambda t: (t,), lambda t: t)
    if layer == "attention.qkv":
        return Exchange(
            hf_names,
            lambda t: (transpose_matrix(torch.cat(split_qkv(config, t))),),
            lambda t: fuse_qkv(config, *transpose_matrix(t).chunk(3)),
        )
    if layer == "embedding.positions":
        return Exchange(hf_names, lambda t: (t,), lambda t: t)
    return Exchange(hf_names, lambda t: (transpose_matrix(t),), transpose_matrix)
