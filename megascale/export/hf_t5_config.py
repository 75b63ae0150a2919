"""T5's shape as the `config.json` of T5ForConditionalGeneration, and back. Pure, no torch."""

from collections.abc import Mapping
from typing import Any

from megascale.config.model import ModelConfig
from megascale.errors import ConfigError

T5_FIELDS = {
    "num_layers": "num_layers", "num_decoder_layers": "num_decoder_layers", "d_model": "d_model",
    "num_heads": "num_heads", "head_width": "d_kv", "d_ff": "d_ff", "vocab_size": "vocab_size",
    "max_seq_len": "n_positions", "norm_eps": "layer_norm_epsilon", "tie_embeddings": "tie_word_embeddings",
    "relative_buckets": "relative_attention_num_buckets",
    "relative_max_distance": "relative_attention_max_distance", "activation": "feed_forward_proj",
}
"""Our field -> theirs."""
T5_DEFAULTS = {
    "num_decoder_layers": None, "n_positions": 512, "layer_norm_epsilon": 1e-6, "tie_word_embeddings": True,
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "feed_forward_proj": "relu",
}
"""What their class takes for a field that is left out; `n_positions` is what the published models saw."""
T5_LEGAL = {"feed_forward_proj": ("relu", "gated-gelu")}
"""Values that our model computes; the first is what their class takes for a field that is left out."""
T5_ACTIVATIONS = {"relu": "relu", "geglu": "gated-gelu"}
"""Our activation -> theirs, whose gated GELU has the tanh form as ours."""


def t5_architecture(config: ModelConfig) -> str:
    """The class that computes what this model computes.

    Raises:
        ConfigError: there is none; the message names the setting.
    """
    if config.feed_forward not in T5_ACTIVATIONS or config.has_bias:
        raise ConfigError(
            f"model.activation = {config.feed_forward} with bias {config.has_bias} of family t5 can't be exported:"
            f" T5ForConditionalGeneration is taken with {' or '.join(T5_ACTIVATIONS)}, and has no biases"
        )
    return "T5ForConditionalGeneration"


def derive_t5_config(config: ModelConfig, common: Mapping[str, Any], eos_id: int) -> dict[str, Any]:
    """The values of `config.json`; the decoder begins with, and padding is, the end-of-text token as here."""
    section = t5_section(config)
    fields = {theirs: section[ours] for ours, theirs in T5_FIELDS.items()}
    return {
        **common, **fields, "model_type": "t5", "feed_forward_proj": T5_ACTIVATIONS[config.feed_forward],
        "dropout_rate": config.dropout, "is_encoder_decoder": True, "decoder_start_token_id": eos_id,
        "pad_token_id": eos_id, "initializer_factor": 1.0,
    }


def t5_section(config: ModelConfig) -> dict[str, Any]:
    """The resolved fields of a model that decide what it computes, by our names."""
    resolved = {
        "num_decoder_layers": config.decoder_layers, "head_width": config.head_dim, "d_ff": config.ffn_dim,
        "tie_embeddings": config.is_tied, "activation": config.feed_forward,
    }
    return {name: resolved.get(name, getattr(config, name)) for name in T5_FIELDS}


def read_t5_config(known: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` section of a `config.json` with its defaults filled in; an unknown activation is left as theirs."""
    section = {ours: known[theirs] for ours, theirs in T5_FIELDS.items()}
    ours_of = {theirs: ours for ours, theirs in T5_ACTIVATIONS.items()}
    return section | {
        "num_decoder_layers": section["num_decoder_layers"] or section["num_layers"],
        "activation": ours_of.get(section["activation"], section["activation"]),
    }
