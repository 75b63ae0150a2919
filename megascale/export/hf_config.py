"""Our config as the `config.json` of transformers: which of its classes computes the same, with which settings.

`gpt2` is GPT2LMHeadModel, `llama` LlamaForCausalLM, and `llama` with a window MistralForCausalLM: Mistral 7B is a LLaMA
with a sliding window (Jiang et al. 2023, arXiv 2310.06825), and counts the query itself as one of its tokens as we do.
`moe` is MixtralForCausalLM (`hf_moe.py`).
"""

from typing import Any

from megascale.config.model import ModelConfig
from megascale.errors import ConfigError
from megascale.export.hf_bert_config import bert_architecture, bert_fields
from megascale.export.hf_moe import check_mixtral, mixtral_fields
from megascale.export.hf_rotary import has_window, qwen3_fields, rotary_architecture, rotary_fields
from megascale.export.hf_t5_config import derive_t5_config, t5_architecture
from megascale.export.hf_vit_config import vit_architecture, vit_fields


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
    if config.family == "bert":
        return common | bert_fields(config, eos_id)
    if config.family == "t5":
        return derive_t5_config(config, common, eos_id)
    if config.family == "vit":
        return {key: common[key] for key in ("architectures", "initializer_range", "torch_dtype")} | vit_fields(config)
    if architecture == "GPT2LMHeadModel":
        return common | {
            "model_type": "gpt2", "n_positions": config.max_seq_len, "n_embd": config.d_model,
            "n_layer": config.num_layers, "n_head": config.num_heads, "n_inner": config.ffn_dim,
            "activation_function": "gelu_new", "layer_norm_epsilon": config.norm_eps, "embd_pdrop": config.dropout,
            "resid_pdrop": config.dropout, "attn_pdrop": 0.0,
        }
    rotary = rotary_fields(config)
    if architecture == "MixtralForCausalLM":
        return common | rotary | mixtral_fields(config)
    if architecture == "Qwen3ForCausalLM":
        return common | rotary | qwen3_fields(config)
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
    if config.family == "bert":
        return bert_architecture(config)
    if config.family == "t5":
        return t5_architecture(config)
    if config.family == "vit":
        return vit_architecture(config)
    if config.family == "transformer":
        raise ConfigError(
            "model.family = transformer can't be exported: transformers has no class of post-norm stacks that share one"
            " embedding and add sines in pairs of features; T5ForConditionalGeneration takes family t5"
        )
    if config.family == "gpt2":
        if has_window(config):
            raise ConfigError(
                f"model.window = {config.window} of family gpt2 can't be exported: GPT2LMHeadModel sees all tokens"
                f" before a query, and max_seq_len is {config.max_seq_len}. Windows can be exported of family llama"
            )
        return "GPT2LMHeadModel"
    if config.family == "moe":
        check_mixtral(config)
        return "MixtralForCausalLM"
    return rotary_architecture(config)


def derive_generation_config(eos_id: int, *, has_decoder: bool) -> dict[str, Any]:
    """The values of `generation_config.json`: a text begins after, and ends with, the same token.

    Args:
        has_decoder: whether it is written by a decoder that reads an encoder.
    """
    names = ["bos_token_id", "eos_token_id", "pad_token_id", *["decoder_start_token_id"] * has_decoder]
    return dict.fromkeys(names, eos_id)


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
