"""Our config as the `config.json` of transformers: which of its classes computes the same, with which settings.

`gpt2` is GPT2LMHeadModel, `llama` LlamaForCausalLM, and `llama` with a window MistralForCausalLM: Mistral 7B is a LLaMA
with a sliding window (Jiang et al. 2023, arXiv 2310.06825), and counts the query itself as one of its tokens as we do.
"""

from typing import Any

from megascale.config.model import ModelConfig
from megascale.errors import ConfigError


def derive_hf_config(config: ModelConfig, *, eos_id: int, dtype: str) -> dict[str, Any]:
    """The values of `config.json` for a model of this shape.

    A window that no sequence exceeds is none. `dropout` becomes GPT-2's `embd_pdrop` and `resid_pdrop`, which drop at
    the same places; LLaMA has no such dropout there, so it is left out. Neither matters unless the model is trained on.

    Args:
        eos_id: the token that ends a text, and that each text began after.
        dtype: of the weights: `float32`, `bfloat16` or `float16`.

    Raises:
        ConfigError: no class of transformers computes this.
    """
    architecture = choose_architecture(config)
    common = {
        "architectures": [architecture], "vocab_size": config.vocab_size, "tie_word_embeddings": config.is_tied,
        "initializer_range": config.init_std, "bos_token_id": eos_id, "eos_token_id": eos_id,
        "torch_dtype": dtype,  # transformers 4 reads this name, 5 both
    }
    if architecture == "GPT2LMHeadModel":
        return common | {
            "model_type": "gpt2", "n_positions": config.max_seq_len, "n_embd": config.d_model,
            "n_layer": config.num_layers, "n_head": config.num_heads, "n_inner": config.ffn_dim,
            "activation_function": "gelu_new", "layer_norm_epsilon": config.norm_eps, "embd_pdrop": config.dropout,
            "resid_pdrop": config.dropout, "attn_pdrop": 0.0,
        }
    rotary = {
        "hidden_size": config.d_model, "intermediate_size": config.ffn_dim, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim,
        "hidden_act": "silu", "max_position_embeddings": config.max_seq_len, "rms_norm_eps": config.norm_eps,
        "attention_dropout": 0.0,
        "rope_theta": config.rotary_base,  # transformers 4 reads this, 5 the next
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_base},
    }
    if architecture == "MistralForCausalLM":
        return common | rotary | {"model_type": "mistral", "sliding_window": config.window}
    return common | rotary | {
        "model_type": "llama", "attention_bias": config.has_bias, "mlp_bias": config.has_bias, "pretraining_tp": 1,
    }


def choose_architecture(config: ModelConfig) -> str:
    """The class of transformers that computes what this model computes.

    Raises:
        ConfigError: there is none; the message names the setting.
    """
    has_window = config.window is not None and config.window < config.max_seq_len
    if config.family == "gpt2":
        if has_window:
            raise ConfigError(
                f"model.window = {config.window} of family gpt2 can't be exported: GPT2LMHeadModel sees all tokens"
                f" before a query, and max_seq_len is {config.max_seq_len}. Windows can be exported of family llama"
            )
        return "GPT2LMHeadModel"
    if not has_window:
        return "LlamaForCausalLM"
    if config.has_bias:
        raise ConfigError(
            f"model.window = {config.window} with model.bias = true of family llama can't be exported:"
            " MistralForCausalLM has windows but no biases, LlamaForCausalLM biases but no windows"
        )
    return "MistralForCausalLM"


def derive_generation_config(eos_id: int) -> dict[str, Any]:
    """The values of `generation_config.json`: a text begins after, and ends with, the same token."""
    return {"bos_token_id": eos_id, "eos_token_id": eos_id, "pad_token_id": eos_id}


def derive_tokenizer_config(eos_token: str | None, max_seq_len: int) -> dict[str, Any]:
    """The values of `tokenizer_config.json`, with which AutoTokenizer takes `tokenizer.json` as it is.

    Args:
        eos_token: the text of the token that ends a text, None where the tokenizer has no such token.
        max_seq_len: tokens that the model accepts.
    """
    special = {} if eos_token is None else dict.fromkeys(("bos_token", "eos_token", "pad_token"), eos_token)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": False, **special,
    }
