"""Closed forms of parameters and operations against the model itself."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megascale.config.model import ModelConfig
from megascale.model.flops import forward_flops_per_token, num_parameters, train_flops_per_token
from megascale.model.transformer import build_model

SHAPE = {"num_layers": 3, "d_model": 64, "num_heads": 4, "vocab_size": 100, "max_seq_len": 32}
CONFIGS = {
    "gpt2": ModelConfig(family="gpt2", **SHAPE),
    "gpt2_untied_no_bias": ModelConfig(family="gpt2", bias=False, tie_embeddings=False, **SHAPE),
    "llama": ModelConfig(family="llama", **SHAPE),
    "llama_gqa_tied": ModelConfig(family="llama", num_kv_heads=2, tie_embeddings=True, bias=True, d_ff=96, **SHAPE),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_parameters(config):
    model = build_model(config, seed=1)
    assert num_parameters(config) == sum(parameter.numel() for parameter in model.parameters())
    num_tables = 1 if config.is_tied else 2
    assert num_parameters(config) - num_parameters(config, has_padding=False) == num_tables * 28 * 64


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_operations(config):
    """The unfused attention computes all T keys, which is also what the convention counts."""
    model = build_model(config, seed=1)
    tokens_BT = torch.zeros(2, 32, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits_BTV = model(tokens_BT)
        assert counter.get_total_flops() == forward_flops_per_token(config, 32) * 64
        logits_BTV[..., :100].sum().backward()
    assert counter.get_total_flops() == train_flops_per_token(config, 32) * 64


def test_gpt3_as_a_worked_example():
    """6N and 12 L D T by hand for GPT-3 175B: 2048 tokens of context add under 3 %."""
    config = ModelConfig(
        family="gpt2", num_layers=96, d_model=12288, num_heads=96, vocab_size=50257, vocab_multiple=1, max_seq_len=2048
    )
    weights = 96 * 12 * 12288**2 + 12288 * 50257
    assert train_flops_per_token(config, 2048) == 6 * weights + 12 * 96 * 12288 * 2048
    assert num_parameters(config) == pytest.approx(175e9, rel=0.005)
