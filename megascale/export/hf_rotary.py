"""Which class of transformers computes what a LLaMA-like model computes, and what its `config.json` says of it.

Plain ones are LlamaForCausalLM, those with a window MistralForCausalLM, those with normalised queries and keys
Qwen3ForCausalLM, which has windows, too, in all blocks or in some.
"""

from collections.abc import Iterable
from typing import Any

from megascale.config.model import ModelConfig
from megascale.errors import ConfigError

ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh"}


def rotary_architecture(config: ModelConfig) -> str:
    """The class for family llama.

    Raises:
        ConfigError: there is none; the message names the setting.
    """
    problems = list(_problems(config))
    if problems:
        raise ConfigError("\n".join(problems))
    if config.qk_norm:
        return "Qwen3ForCausalLM"
    return "MistralForCausalLM" if has_window(config) else "LlamaForCausalLM"


def has_window(config: ModelConfig) -> bool:
    """Whether there is a window that some sequence exceeds."""
    return config.window is not None and config.window < config.max_seq_len


def rotary_fields(config: ModelConfig) -> dict[str, Any]:
    """What the classes with rotary positions have in common."""
    rope = {"rope_type": "default", "rope_theta": config.rotary_base} | rope_fields(config)
    fields = {
        "hidden_size": config.d_model, "intermediate_size": config.ffn_dim, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim,
        "hidden_act": ACTIVATIONS[config.feed_forward], "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps, "attention_dropout": 0.0,
        "rope_theta": config.rotary_base,  # transformers 4 reads this, 5 the next
        "rope_parameters": rope,
    }
    return fields | ({"rope_scaling": rope_fields(config)} if config.rope_scaling else {})


def rope_fields(config: ModelConfig) -> dict[str, Any]:
    """The stretching of positions."""
    scaling = config.rope_scaling
    if scaling is None:
        return {}
    fields = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return fields
    fields["original_max_position_embeddings"] = scaling.original_seq_len
    if scaling.kind == "llama3":
        return fields | {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    return fields | {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}


def qwen3_fields(config: ModelConfig) -> dict[str, Any]:
    """What Qwen3ForCausalLM has beside."""
    fields = {"model_type": "qwen3", "attention_bias": False, "use_sliding_window": has_window(config)}
    if not has_window(config):
        return fields | {"sliding_window": None, "layer_types": ["full_attention"] * config.num_layers}
    every = config.global_every or config.num_layers + 1
    kinds = ["sliding_attention" if number % every else "full_attention" for number in range(1, config.num_layers + 1)]
    return fields | {"sliding_window": config.window, "layer_types": kinds}


def _problems(config: ModelConfig) -> Iterable[str]:
    """A line for each setting that no class has."""
    if config.family == "palm":
        yield (
            "model.family = palm can't be exported: transformers has no class of blocks in one piece with SwiGLU;"
            " families gpt2 and llama can be exported"
        )
        return
    for key in ("attention_softcap", "logit_softcap"):
        if getattr(config, key) is not None:
            yield (
                f"model.{key} = {getattr(config, key):g} can't be exported: the one class that bends scores, Gemma2,"
                " has two norms more in each block"
            )
    if config.feed_forward not in ACTIVATIONS:
        yield (
            f"model.activation = {config.feed_forward} of family llama can't be exported: its classes have a gate;"
            f" those with {' or '.join(ACTIVATIONS)} can"
        )
    if has_window(config) and config.global_every and not config.qk_norm:
        yield (
            f"model.global_every = {config.global_every} can't be exported without model.qk_norm: MistralForCausalLM"
            " has the same window in all blocks, and Qwen3ForCausalLM, which mixes them, normalises queries and keys"
        )
    if config.has_bias and (config.qk_norm or has_window(config)):
        name, only = ("qk_norm = true", "Qwen3ForCausalLM has norms") if config.qk_norm else (
            f"window = {config.window}", "MistralForCausalLM has windows")
        yield (
            f"model.{name} with model.bias = true of family llama can't be exported: {only} but no biases,"
            " LlamaForCausalLM biases but no norms of heads and no windows"
        )
