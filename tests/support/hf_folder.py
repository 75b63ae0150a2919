"""Models of transformers, saved as Hugging Face folders, for the tests of import."""

import shutil
from pathlib import Path

import torch
import yaml
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

ENDS = {"bos_token_id": 0, "eos_token_id": 0}
LLAMA_SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "vocab_size": 64,
}
GPT2_SHAPE = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 64}


def build_hf_model(kind: str, **settings):
    """A tiny model whose every weight, norms and biases included, is far from special values.

    Args:
        kind: `gpt2`, `llama`, `mistral` or `qwen3`.
        settings: of its config, beside the tiny shape.
    """
    config_class, model_class, shape = {
        "gpt2": (GPT2Config, GPT2LMHeadModel, GPT2_SHAPE),
        "llama": (LlamaConfig, LlamaForCausalLM, LLAMA_SHAPE),
        "mistral": (MistralConfig, MistralForCausalLM, LLAMA_SHAPE),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM, LLAMA_SHAPE),
    }[kind]
    torch.manual_seed(5)
    model = model_class(config_class(**shape | ENDS | settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def save_hf_model(model, folder: Path, corpus: Path | None = None, **settings) -> Path:
    """Saves a model, with the tokenizer of a corpus."""
    model.save_pretrained(folder, **settings)
    if corpus is not None:
        shutil.copy(corpus / "tokenizer.json", folder / "tokenizer.json")
    return folder


def write_import_config(path: Path, run_folder: Path, corpus: Path, section: dict, **sections: dict) -> Path:
    """Writes the config of a run of 2 steps of 8 rows of 32 tokens with this `model` section."""
    config = {
        "run": {"name": "imported", "folder": str(run_folder), "seed": 3},
        "model": section,
        "data": {"folder": str(corpus), "window_rows": 16, "num_lanes": 4},
        "train": {"seq_len": 32, "micro_batch_size": 2, "global_batch_tokens": 256, "max_steps": 2},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1},
        "precision": {"dtype": "fp32"},
        "evaluate": {"interval_steps": 2, "max_rows": 8},
        "checkpoint": {"interval_steps": 2},
        "observe": {"wandb": {"mode": "disabled"}},
    }
    path.write_text(yaml.safe_dump(config | sections))
    return path
