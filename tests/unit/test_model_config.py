"""The model section: resolved values, refusals, and the shapes that ship with the project."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from megascale.config.model import ModelConfig
from megascale.model.flops import num_parameters

SHAPES = Path(__file__).parents[2] / "configs" / "model"
SMALL = {"num_layers": 2, "d_model": 64, "num_heads": 4, "vocab_size": 100, "max_seq_len": 32}


def test_family_defaults():
    gpt2 = ModelConfig(family="gpt2", **SMALL)
    llama = ModelConfig(family="llama", **SMALL)
    assert (gpt2.ffn_dim, gpt2.is_tied, gpt2.has_bias, gpt2.kv_heads, gpt2.head_dim) == (256, True, True, 4, 16)
    assert (llama.ffn_dim, llama.is_tied, llama.has_bias, llama.rotary_base) == (192, False, False, 10000.0)


def test_given_values_win():
    given_values = {"d_ff": 100, "tie_embeddings": True, "bias": True, "rope_theta": 5e5, "num_kv_heads": 2}
    config = ModelConfig(family="llama", **SMALL, **given_values)
    assert (config.ffn_dim, config.is_tied, config.has_bias, config.rotary_base) == (100, True, True, 5e5)
    assert config.kv_heads == 2


@given(vocab_size=st.integers(1, 10**6), multiple=st.integers(1, 1024))
@settings(deadline=None)
def test_padded_vocabulary_is_the_smallest_multiple(vocab_size, multiple):
    config = ModelConfig(family="gpt2", **SMALL | {"vocab_size": vocab_size}, vocab_multiple=multiple)
    assert config.padded_vocab_size % multiple == 0
    assert vocab_size <= config.padded_vocab_size < vocab_size + multiple


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 6}, "model.num_heads = 6 does not divide model.d_model = 64; use one of 1, 2, 4, 8, 16, 32, 64"),
        ({"num_kv_heads": 3}, "model.num_kv_heads = 3 does not divide model.num_heads = 4; use one of 1, 2, 4"),
        ({"num_heads": 64}, "heads of 1 features, and rotary .* an even number; use one of 1, 2, 4, 8, 16, 32"),
        ({"family": "gpt2", "num_kv_heads": 2}, "model.num_kv_heads = 2 needs model.family = llama"),
        ({"family": "gpt2", "rope_theta": 1e4}, "model.rope_theta = 10000.0 needs model.family = llama"),
        ({"dropout": 1.0}, "less than 1"),
        ({"num_layers": 0}, "greater than 0"),
        ({"d_model": "64"}, "valid integer"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        ModelConfig(**{"family": "llama"} | SMALL | changes)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("gpt2-124m", 124_439_808),
        ("gpt2-1.5b", 1_557_611_200),
        ("llama-1b", 1_235_814_400),
        ("llama-8b", 8_030_261_248),
    ],
)
def test_shipped_shapes_have_their_published_size(name, published):
    text = (SHAPES / f"{name}.yaml").read_text()
    config = ModelConfig(**yaml.safe_load(text)["model"])
    assert num_parameters(config, has_padding=False) == published
    assert f"{published:,} parameters" in text
    assert f"{num_parameters(config):,}" in text
