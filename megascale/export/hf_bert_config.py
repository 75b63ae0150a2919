"""BERT's settings as transformers names them, both ways. Pure.

With a pair head it is BertForPreTraining, else BertForMaskedLM.
"""

from collections.abc import Mapping
from typing import Any

from megascale.config.model import ModelConfig
from megascale.config.objective import ObjectiveConfig
from megascale.errors import ConfigError

HF_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}
"""Ours -> theirs."""
ARCHITECTURES = {"BertForPreTraining": True, "BertForMaskedLM": False}
"""Their class -> whether it has a pair head."""
BERT_FIELDS = {
    "num_layers": "num_hidden_layers", "d_model": "hidden_size", "num_heads": "num_attention_heads",
    "d_ff": "intermediate_size", "vocab_size": "vocab_size", "max_seq_len": "max_position_embeddings",
    "norm_eps": "layer_norm_eps", "tie_embeddings": "tie_word_embeddings", "num_segments": "type_vocab_size",
}
"""Our field -> theirs."""
BERT_DEFAULTS = {"layer_norm_eps": 1e-12, "tie_word_embeddings": True, "type_vocab_size": 2}
BERT_LEGAL = {
    "hidden_act": (*HF_ACTIVATIONS.values(), "gelu_pytorch_tanh"), "position_embedding_type": ("absolute",),
    "is_decoder": (False,), "add_cross_attention": (False,), "architectures": tuple([name] for name in ARCHITECTURES),
}
"""Values that our model computes; the first is what their class takes for a field that is left out."""


def bert_architecture(config: ModelConfig) -> str:
    """The class that computes what this model computes.

    Raises:
        ConfigError: there is none; the message names the setting.
    """
    wrong = []
    if not config.has_bias:
        wrong.append("model.bias = false")
    if config.feed_forward not in HF_ACTIVATIONS:
        wrong.append(f"model.activation = {config.feed_forward}")
    if config.heads_dim != config.d_model:
        wrong.append(f"model.head_width = {config.head_width}")
    if wrong:
        raise ConfigError(
            f"{', '.join(wrong)} of family bert can't be exported: the Bert classes of transformers have biases, heads"
            f" of d_model / num_heads features and one of {', '.join(HF_ACTIVATIONS)}"
        )
    return next(name for name, has_pairs in ARCHITECTURES.items() if has_pairs == config.pair_head)


def bert_fields(config: ModelConfig, eos_id: int) -> dict[str, Any]:
    """The values of `config.json` that are BERT's own."""
    fields = {
        "num_layers": config.num_layers, "d_model": config.d_model, "num_heads": config.num_heads,
        "d_ff": config.ffn_dim, "vocab_size": config.vocab_size, "max_seq_len": config.max_seq_len,
        "norm_eps": config.norm_eps, "tie_embeddings": config.is_tied, "num_segments": config.num_segments,
    }
    return {theirs: fields[ours] for ours, theirs in BERT_FIELDS.items()} | {
        "model_type": "bert", "hidden_act": HF_ACTIVATIONS[config.feed_forward], "pad_token_id": eos_id,
        "hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": 0.0,
        "position_embedding_type": "absolute",
    }


def bert_section(section: dict[str, Any], hf: Mapping[str, Any]) -> dict[str, Any]:
    """A `model` section of BERT, of which the fields with a plain counterpart are there, with its others."""
    activations = {theirs: ours for ours, theirs in HF_ACTIVATIONS.items()} | {"gelu_pytorch_tanh": "gelu_tanh"}
    (architecture,) = hf.get("architectures") or ["BertForPreTraining"]
    return section | {
        "bias": True, "activation": activations[hf.get("hidden_act") or "gelu"],
        "pair_head": ARCHITECTURES[architecture],
    }


def bert_tokens(objective: ObjectiveConfig) -> dict[str, str]:
    """The values of `tokenizer_config.json` that name the tokens of masking."""
    return {"mask_token": objective.mask_token, "cls_token": objective.cls_token, "sep_token": objective.sep_token}
