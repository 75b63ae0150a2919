"""What a Hugging Face `config.json` says, as our `model` section, and where a config differs from it. Pure, no torch.

Only what our model computes in the same way is taken: everything else is refused by its name, never ignored.
"""

import json
from collections.abc import Mapping
from typing import Any

from megascale.config.model import ModelConfig
from megascale.errors import ConfigError
from megascale.export.hf_bert_config import BERT_DEFAULTS, BERT_FIELDS, BERT_LEGAL, bert_section
from megascale.export.hf_moe import moe_section, moe_section_of
from megascale.export.hf_rotary_import import (
    QWEN3_DEFAULTS,
    qwen3_problems,
    rope_problems,
    rotary_section,
    section_of_rotary,
)
from megascale.export.hf_t5_config import T5_DEFAULTS, T5_FIELDS, T5_LEGAL, read_t5_config, t5_section
from megascale.export.hf_vit_config import VIT_DEFAULTS, VIT_FIELDS, VIT_LEGAL, vision_of, vit_section

FAMILY = {
    "gpt2": "gpt2", "llama": "llama", "mistral": "llama", "qwen3": "llama", "mixtral": "moe", "bert": "bert",
    "t5": "t5", "vit": "vit",
}
"""Their `model_type` -> our family."""
_LLAMA_NAMES = {
    "num_layers": "num_hidden_layers", "d_model": "hidden_size", "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads", "d_ff": "intermediate_size", "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings", "norm_eps": "rms_norm_eps", "tie_embeddings": "tie_word_embeddings",
}
HF_FIELDS = {
    "gpt2": {
        "num_layers": "n_layer", "d_model": "n_embd", "num_heads": "n_head", "d_ff": "n_inner",
        "vocab_size": "vocab_size", "max_seq_len": "n_positions", "norm_eps": "layer_norm_epsilon",
        "tie_embeddings": "tie_word_embeddings",
    },
    "llama": _LLAMA_NAMES,
    "mistral": _LLAMA_NAMES | {"window": "sliding_window"},
    "qwen3": _LLAMA_NAMES,
    "mixtral": _LLAMA_NAMES | {"window": "sliding_window"},
    "bert": BERT_FIELDS,
    "t5": T5_FIELDS,
    "vit": VIT_FIELDS,
}
"""Their `model_type` -> our field -> theirs. Where `config.json` lacks one, `_DEFAULTS` has what their class takes."""
_DEFAULTS = {
    "gpt2": {"n_inner": None, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    "llama": {"num_key_value_heads": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
    "mistral": {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "sliding_window": 4096},
    "qwen3": QWEN3_DEFAULTS,
    "mixtral": {
        "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "sliding_window": None,
        "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    "bert": BERT_DEFAULTS,
    "t5": T5_DEFAULTS,
    "vit": VIT_DEFAULTS,
}
_LLAMA_LEGAL = {"hidden_act": ("silu", "swish"), "pretraining_tp": (1,), "partial_rotary_factor": (1.0,)}
_LEGAL = {
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
    },
    "llama": _LLAMA_LEGAL,
    "mistral": _LLAMA_LEGAL,
    "qwen3": _LLAMA_LEGAL,
    "mixtral": _LLAMA_LEGAL | {"router_jitter_noise": (0.0,)},
    "bert": BERT_LEGAL,
    "t5": T5_LEGAL,
    "vit": VIT_LEGAL,
}
"""Values that our model computes; the first is what their class takes for a field that is left out."""
_COUNTS = {
    "n_layer", "n_embd", "n_head", "vocab_size", "n_positions", "num_hidden_layers", "hidden_size",
    "num_attention_heads", "intermediate_size", "max_position_embeddings", "type_vocab_size",
}


def model_section(hf: dict[str, Any], place: str) -> dict[str, Any]:
    """The `model` section that computes what a `config.json` describes.

    Args:
        hf: its content.
        place: the file, for messages.

    Raises:
        ConfigError: a field is missing, or says what our model doesn't compute; all such fields are listed.
    """
    kind = hf.get("model_type")
    if kind not in FAMILY:
        raise ConfigError(f"{place}: model_type is {kind!r}; what can be imported is {', '.join(FAMILY)}")
    names, known = HF_FIELDS[kind], _DEFAULTS[kind] | hf
    missing = [name for name in names.values() if name not in known]
    if missing:
        raise ConfigError(f"{place}: lacks {', '.join(missing)}, which a {kind} config must say")
    problems = [f"{name} = {known[name]!r}: must be a whole number over 0" for name in names.values()
                if name in _COUNTS and not _is_count(known[name])]
    problems = problems or _unsupported(hf, kind)
    if problems:
        raise ConfigError(f"{place}: describes what this model can't compute:\n  " + "\n  ".join(problems))
    section = {"family": FAMILY[kind]} | {ours: known[theirs] for ours, theirs in names.items()}
    section.setdefault("window", None)
    if kind == "bert":
        return bert_section(section, hf)
    if kind == "vit":
        return vit_section(section, known)
    if kind == "t5":
        return section | read_t5_config(known) | {"bias": False}
    if kind == "gpt2":
        section["d_ff"] = section["d_ff"] or 4 * section["d_model"]
        return section | {"bias": True}
    section["num_kv_heads"] = section["num_kv_heads"] or section["num_heads"]
    section |= rotary_section(known, section["window"]) | {"bias": bool(hf.get("attention_bias"))}
    return section | ({"moe": moe_section(known)} if kind == "mixtral" else {})


def section_of(model: ModelConfig) -> dict[str, Any]:
    """The resolved fields of a model that decide what it computes, named as in its config section."""
    section = {
        "family": model.family, "num_layers": model.num_layers, "d_model": model.d_model, "num_heads": model.num_heads,
        "d_ff": model.ffn_dim, "vocab_size": model.vocab_size, "max_seq_len": model.max_seq_len,
        "norm_eps": model.norm_eps, "tie_embeddings": model.is_tied, "window": model.window, "bias": model.has_bias,
    }
    if model.family == "t5":
        return section | t5_section(model)
    if model.family == "vit":
        return section | vision_of(model)
    if model.family == "bert":
        return section | {
            "num_segments": model.num_segments, "pair_head": model.pair_head, "activation": model.feed_forward,
        }
    if model.moe is not None:
        section |= {"d_ff": model.expert_dim, "moe": moe_section_of(model)}
    return section | ({"num_kv_heads": model.kv_heads} | section_of_rotary(model) if model.is_rotary else {})


def differences(section: dict[str, Any], model: ModelConfig, names: Mapping[str, str]) -> list[str]:
    """Each field in which a model isn't that of a section, with the value to set; empty when it is the same.

    The longest row may differ where positions turn, since no weight depends on it.

    Args:
        names: our field -> theirs, where theirs has another name.
    """
    ours = section_of(model) | {"vocab_multiple": model.vocab_multiple}
    free = {"max_seq_len"} if section["family"] in ("llama", "moe", "t5") else set()
    return [
        f"model.{key} = {ours.get(key)!r} here, {names.get(key, key)} = {value!r} there;"
        f" set model.{key}={json.dumps(value)}"
        for key, value in section.items() if key not in free and ours.get(key) != value
    ]


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _unsupported(hf: dict[str, Any], kind: str) -> list[str]:
    problems = []
    for name, legal in _LEGAL[kind].items():
        value = hf.get(name)
        if value is not None and value not in legal:
            problems.append(f"{name} = {value!r}: only {legal[0]!r} is supported")
    if hf.get("quantization_config"):
        problems.append("quantization_config: the weights are quantized; import the model that they were made from")
    if kind in ("gpt2", "bert", "t5", "vit"):
        return problems
    problems += rope_problems(hf)
    if kind == "qwen3":
        problems += qwen3_problems(_DEFAULTS[kind] | hf)
    biases = [bool(hf.get(name)) for name in ("attention_bias", "mlp_bias")]
    if biases[0] != biases[1] or (kind in ("mistral", "mixtral", "qwen3") and any(biases)):
        problems.append(f"attention_bias = {biases[0]} and mlp_bias = {biases[1]}: all linear layers have biases here,"
                        " or none has")
    return problems
