"""Closed forms of parameters and operations against the models themselves, of every family."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megascale.config.model import ModelConfig
from megascale.model.axes import ONE_RANK
from megascale.model.flops import (
    forward_flops_per_token,
    layer_costs,
    num_active_parameters,
    num_parameters,
    train_flops_per_token,
)
from megascale.model.layer_forms import Lengths, layer_forms
from megascale.model.sharding import rule_of
from megascale.model.transformer import Transformer, build_model

SHAPE = {"num_layers": 3, "d_model": 64, "num_heads": 4, "vocab_size": 100, "max_seq_len": 32}
MOE = {"family": "moe", **SHAPE, "num_kv_heads": 2}
VIT = {"family": "vit", **SHAPE}
IMAGE = {"image_size": 32, "patch_size": 8}
STACKS = {
    "gpt2": ModelConfig(family="gpt2", **SHAPE),
    "gpt2_untied_no_bias": ModelConfig(family="gpt2", bias=False, tie_embeddings=False, **SHAPE),
    "llama": ModelConfig(family="llama", **SHAPE),
    "llama_gqa_tied": ModelConfig(family="llama", num_kv_heads=2, tie_embeddings=True, bias=True, d_ff=96, **SHAPE),
    "llama_features": ModelConfig(
        family="llama", num_kv_heads=2, head_width=24, qk_norm=True, window=32, global_every=2, **SHAPE),
    "palm": ModelConfig(family="palm", num_kv_heads=1, **SHAPE),
}
OTHERS = {
    "moe": ModelConfig(moe={"num_experts": 8, "top_k": 2}, **MOE),
    "moe_fine": ModelConfig(moe={
        "num_experts": 8, "top_k": 3, "d_expert": 32, "num_shared_experts": 2, "num_dense_layers": 1}, **MOE),
    "bert": ModelConfig(family="bert", **SHAPE),
    "bert_pairs": ModelConfig(family="bert", pair_head=True, **SHAPE),
    "t5": ModelConfig(family="t5", num_decoder_layers=2, head_width=24, **SHAPE),
    "t5_gated_untied": ModelConfig(family="t5", activation="geglu", tie_embeddings=False, **SHAPE),
    "transformer": ModelConfig(family="transformer", **SHAPE),
    "vit": ModelConfig(vision=IMAGE, **VIT),
    "vit_mean": ModelConfig(vision=IMAGE | {"pooling": "mean"}, **VIT),
    "mae": ModelConfig(
        vision=IMAGE | {"mae_decoder_layers": 2, "mae_decoder_width": 32, "mae_decoder_heads": 4}, **VIT),
}
CONFIGS = STACKS | OTHERS


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_parameters_of_each_layer_and_how_they_are_cut(config):
    """By the rules that cut and decay the real ones."""
    with torch.device("meta"):
        model = Transformer(config, axes=ONE_RANK)
    named = dict(model.named_parameters())
    assert num_parameters(config) == sum(parameter.numel() for parameter in named.values())
    forms = layer_forms(config, Lengths(32))
    assert [layer.name for layer in forms] == [spec.name for spec in model.specs]
    for layer in forms:
        found = dict.fromkeys(("cut_matrices", "cut_vectors", "whole_matrices", "whole_vectors", "experts"), 0)
        for name, parameter in named.items():
            if name.startswith(f"{layer.name}."):
                rule = rule_of(name)
                share, kind = "whole" if rule.tp_dim is None else "cut", "matrices" if rule.decays else "vectors"
                found["experts" if rule.ep_dim is not None else f"{share}_{kind}"] += parameter.numel()
        form = replace(layer.form, operations=0, idle_experts=0)
        assert {key: getattr(form, key) for key in found} == found, layer.name


def test_a_published_vocabulary_has_no_padding():
    for config in (STACKS["gpt2"], STACKS["llama"], OTHERS["t5"]):
        num_tables = 1 if config.is_tied else 2
        assert num_parameters(config) - num_parameters(config, has_padding=False) == num_tables * 28 * 64


@pytest.mark.parametrize("config", STACKS.values(), ids=STACKS.keys())
def test_operations(config):
    """The unfused attention computes all T keys, which is also what the convention counts."""
    model = build_model(config, seed=1)
    tokens_BT = torch.zeros(2, 32, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits_BTV = model(tokens_BT)
        assert counter.get_total_flops() == forward_flops_per_token(config, 32) * 64
        logits_BTV[..., :100].sum().backward()
    assert counter.get_total_flops() == train_flops_per_token(config, 32) * 64


@pytest.mark.parametrize("name", ["moe", "moe_fine"])
def test_operations_of_experts(name):
    """Each token meets its experts and no others."""
    config = OTHERS[name]
    model, tokens_BT = build_model(config, seed=1).eval(), torch.arange(64).view(2, 32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens_BT)
    assert counter.get_total_flops() == forward_flops_per_token(config, 32) * 64


def test_active_parameters_of_mixtral():
    """46.7 B in all, 12.9 B for a token (Jiang et al. 2024, section 2)."""
    config = ModelConfig(
        family="moe", num_layers=32, d_model=4096, num_heads=32, num_kv_heads=8, d_ff=14336, vocab_size=32000,
        max_seq_len=32768, moe={"num_experts": 8, "top_k": 2},
    )
    assert num_parameters(config, has_padding=False) == 46_702_792_704
    assert num_active_parameters(config, has_padding=False) == pytest.approx(12.9e9, rel=0.003)


def test_bert_counts_the_vocabulary_for_masked_tokens_only():
    """All logits at once are what a forward pass without labels gives."""
    config = OTHERS["bert"]
    model, tokens_BT = build_model(config, seed=1).eval(), torch.zeros(2, 32, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens_BT)
    unmasked = 2 * 64 * 128 * (32 - 5)
    assert counter.get_total_flops() == 2 * (forward_flops_per_token(config, 32) * 32 + unmasked)


def test_a_decoder_is_counted_by_its_own_positions():
    """By hand for a T5 with a source of 32 and a target of 8 positions, for each of the 32."""
    config = OTHERS["t5"]
    inner, width, ff = 96, 64, 256
    encoder = 2 * (4 * width * inner + 2 * width * ff) * 32 + 4 * inner * 32 * 32
    decoder = (
        2 * (4 * width * inner + 2 * width * ff) * 8 + 4 * inner * 8 * 8
        + 2 * (2 * width * inner * 8 + 2 * width * inner * 32) + 4 * inner * 8 * 32
    )
    assert forward_flops_per_token(config, 32, 8) * 32 == 3 * encoder + 2 * decoder + 2 * width * 128 * 8
    assert len(layer_costs(config, 32, 8)) == 1 + 3 + 1 + 2 + 1 + 1


def test_keys_outside_a_window_do_not_count():
    """Of three blocks the second sees all 32 tokens, the others 8."""
    config = STACKS["llama_features"].model_copy(update={"window": 8})
    whole = forward_flops_per_token(STACKS["llama_features"], 32)
    assert whole - forward_flops_per_token(config, 32) == 2 * 4 * 96 * (32 - 8)


def test_published_vit_and_mae():
    """ViT-B/16 at 224 pixels: 86.6 M parameters (Dosovitskiy et al. 2020, table 1), 17.5 G multiplications."""
    config = ModelConfig(
        family="vit", num_layers=12, d_model=768, num_heads=12, vocab_size=1000, vocab_multiple=1, max_seq_len=196,
        vision={"image_size": 224, "patch_size": 16},
    )
    assert num_parameters(config) == 86_567_656
    assert forward_flops_per_token(config, 196) * 196 / 2 == pytest.approx(17.56e9, rel=0.005)


def test_gpt3_as_a_worked_example():
    """6N and 12 L D T by hand for GPT-3 175B: 2048 tokens of context add under 3 %."""
    config = ModelConfig(
        family="gpt2", num_layers=96, d_model=12288, num_heads=96, vocab_size=50257, vocab_multiple=1, max_seq_len=2048
    )
    weights = 96 * 12 * 12288**2 + 12288 * 50257
    assert train_flops_per_token(config, 2048) == 6 * weights + 12 * 96 * 12288 * 2048
    assert num_parameters(config) == pytest.approx(175e9, rel=0.005)
