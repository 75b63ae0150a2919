"""Logits and loss against Hugging Face transformers, and the exchange of weights both ways."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from megascale.config.model import ModelConfig
from megascale.model.context import build_context
from megascale.model.families.hf_names import from_hf, to_hf
from megascale.model.rope import rotary_table
from megascale.model.transformer import build_model, compile_blocks

SMALL = {"num_layers": 2, "d_model": 64, "num_heads": 4, "vocab_size": 100, "max_seq_len": 24}
CONFIGS = {
    "gpt2": ModelConfig(family="gpt2", **SMALL),
    "gpt2_untied": ModelConfig(family="gpt2", tie_embeddings=False, **SMALL),
    "llama": ModelConfig(family="llama", **SMALL),
    "llama_gqa_tied": ModelConfig(family="llama", num_kv_heads=2, tie_embeddings=True, rope_theta=5e5, **SMALL),
    "llama_mqa_bias": ModelConfig(family="llama", num_kv_heads=1, bias=True, d_ff=80, **SMALL),
}


def randomized_model(config):
    """A model whose every parameter, norms and biases included, is far from special values."""
    model = build_model(config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
            if name in ("embedding.tokens.weight", "head.weight"):
                parameter[config.vocab_size :] = 0
    return model


def build_hf_model(config):
    common = {"vocab_size": config.vocab_size, "tie_word_embeddings": config.is_tied}
    common |= {"bos_token_id": 0, "eos_token_id": 0}
    if config.family == "gpt2":
        shape = {"n_positions": config.max_seq_len, "n_embd": config.d_model, "n_layer": config.num_layers}
        return GPT2LMHeadModel(GPT2Config(n_head=config.num_heads, **shape, **common)).eval()
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=config.d_model,
            intermediate_size=config.ffn_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rotary_base},
            attention_bias=config.has_bias,
            mlp_bias=config.has_bias,
            **common,
        )
    ).eval()


def random_tokens(config, *shape):
    return torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_and_loss_equal_transformers(config):
    ours = randomized_model(config)
    parameters = dict(ours.named_parameters())
    theirs = build_hf_model(config)
    result = theirs.load_state_dict(to_hf(config, parameters), strict=False)
    assert result.unexpected_keys == []
    assert result.missing_keys == (["lm_head.weight"] if config.is_tied else [])
    theirs.tie_weights()

    tokens_BT = random_tokens(config, 3, config.max_seq_len)
    logits_BTV = ours(tokens_BT)
    expected = theirs(tokens_BT, labels=tokens_BT)
    torch.testing.assert_close(logits_BTV[..., : config.vocab_size], expected.logits, rtol=0, atol=1e-5)
    nll_sum = ours(tokens_BT[:, :-1], labels_BT=tokens_BT[:, 1:])
    assert abs((nll_sum / tokens_BT[:, 1:].numel() - expected.loss).item()) < 1e-5

    back = from_hf(config, parameters, theirs.state_dict())
    assert all(torch.equal(back[name], parameter) for name, parameter in parameters.items())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_documents_of_a_row_know_nothing_of_each_other(family):
    """Two documents in one row give the logits that each has in a row of its own."""
    model = randomized_model(CONFIGS[family])
    first, second = [3, 4, 5, 6, 7], [9, 3, 4, 5, 8, 11, 2]
    tokens_BT = torch.tensor([first + second])
    documents_BT = torch.tensor([[0] * len(first) + [1] * len(second)], dtype=torch.int32)
    context = build_context(model.config, tokens_BT.shape[1], tokens_BT.device, documents_BT=documents_BT)
    assert context.position_ids_BT.tolist() == [[*range(len(first)), *range(len(second))]]
    alone = torch.cat([model(torch.tensor([first])), model(torch.tensor([second]))], dim=1)
    torch.testing.assert_close(model(tokens_BT, context), alone, rtol=0, atol=1e-5)
    assert not torch.allclose(model(tokens_BT)[:, len(first) :], alone[:, len(first) :])


def test_rotary_attention_sees_only_distances():
    model = randomized_model(CONFIGS["llama_gqa_tied"])
    tokens_BT = random_tokens(model.config, 2, 8)
    context = build_context(model.config, 8, tokens_BT.device)
    cos, sin = rotary_table(torch.arange(8)[None] + 5, model.config.head_dim, model.config.rotary_base)
    shifted = context._replace(cos_BA1C=cos, sin_BA1C=sin)
    torch.testing.assert_close(model(tokens_BT, shifted), model(tokens_BT), rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_future_is_not_seen(config):
    model = randomized_model(config)
    tokens_BT = random_tokens(config, 1, 10)
    changed_BT = tokens_BT.clone()
    changed_BT[:, 6] = (changed_BT[:, 6] + 1) % config.vocab_size
    before, after = model(tokens_BT), model(changed_BT)
    torch.testing.assert_close(before[:, :6], after[:, :6], rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, 6:], after[:, 6:])


def test_a_stage_runs_a_part_of_the_list():
    model = randomized_model(CONFIGS["llama"])
    tokens_BT = random_tokens(model.config, 2, 8)
    context = build_context(model.config, 8, tokens_BT.device)
    hidden = tokens_BT
    num_layers = len(model.specs)
    for part in (range(2), range(2, num_layers)):
        (stage,) = build_model(model.config, 1, stages=[part]).stages
        originals = [parameter for index in part for parameter in model.layers[index].parameters()]
        for parameter, original in zip(stage.parameters(), originals, strict=True):
            parameter.data = original.data
        hidden = stage(hidden, context)
    assert torch.equal(hidden, model(tokens_BT))


def test_bf16_stays_near_fp32():
    model = randomized_model(CONFIGS["llama_gqa_tied"])
    tokens_BT = random_tokens(model.config, 2, 24)
    inputs_BT, labels_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
    nll_fp32 = model(inputs_BT, labels_BT=labels_BT)
    nll_bf16 = model.bfloat16()(inputs_BT, labels_BT=labels_BT)
    assert nll_bf16.dtype == torch.float32
    assert abs((nll_bf16 - nll_fp32) / labels_BT.numel()) < 0.02


@pytest.mark.parametrize("config", [CONFIGS["gpt2"], CONFIGS["llama"]], ids=["gpt2", "llama"])
def test_compiled_blocks_share_one_graph(config):
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    config = config.model_copy(update={"dropout": 0.1, "num_layers": 3})
    model = build_model(config, seed=1)
    tokens_BT = random_tokens(config, 2, 8)
    context = build_context(config, 8, tokens_BT.device, row_keys_B=torch.tensor([5, 6]))
    expected, names = model(tokens_BT, context), list(model.state_dict())
    compile_blocks(model, backend=counter)
    torch.testing.assert_close(model(tokens_BT, context), expected, rtol=0, atol=1e-6)
    assert counter.frame_count == 1
    assert list(model.state_dict()) == names
