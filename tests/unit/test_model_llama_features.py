"""What LLaMA-like models add to the plain one, and PaLM's block, against transformers with the same weights."""

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from megascale.config.load import parse_config
from megascale.config.model import ModelConfig
from megascale.config.rope import RopeScalingConfig
from megascale.config.validate import check_config
from megascale.errors import ConfigError
from megascale.export.hf_config import derive_hf_config
from megascale.model.attention_core import Scoring, attend_row
from megascale.model.attention_mask import AttentionMask, build_mask, cp_columns
from megascale.model.axes import ONE_RANK
from megascale.model.context import build_context
from megascale.model.dropout import derive_row_keys
from megascale.model.families.hf_names import to_hf
from megascale.model.kernels import tile_backward, tile_forward
from megascale.model.loss import linear_cross_entropy
from megascale.model.recompute import set_recompute
from megascale.model.rope import frequencies, score_length
from megascale.model.transformer import build_model
from megascale.parallel.axis import ALONE
from tests.unit.test_model_forward import random_tokens, randomized_model

SHAPE = {"num_layers": 2, "d_model": 64, "num_heads": 4, "vocab_size": 100, "max_seq_len": 24}
LLAMA = SHAPE | {"family": "llama", "num_kv_heads": 2}
SCALINGS = {
    "linear": RopeScalingConfig(kind="linear", factor=4.0, original_seq_len=64),
    "llama3": RopeScalingConfig(kind="llama3", factor=8.0, original_seq_len=64),
    "yarn": RopeScalingConfig(kind="yarn", factor=4.0, original_seq_len=64),
    "yarn_narrow": RopeScalingConfig(kind="yarn", factor=40.0, original_seq_len=4096, beta_fast=8.0, beta_slow=2.0),
}
CPU = torch.device("cpu")


def hf_rope(scaling: RopeScalingConfig, base: float) -> dict:
    """The same scaling as transformers writes it."""
    found = {"rope_type": scaling.kind, "rope_theta": base, "factor": scaling.factor}
    if scaling.kind != "linear":
        found["original_max_position_embeddings"] = scaling.original_seq_len
    if scaling.kind == "llama3":
        found |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        found |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
    return found


def hf_shape(config: ModelConfig, **more) -> dict:
    """What the configs of all LLaMA-like classes have in common."""
    rope = {"rope_type": "default", "rope_theta": config.rotary_base}
    if config.rope_scaling:
        rope = hf_rope(config.rope_scaling, config.rotary_base)
    return {
        "hidden_size": config.d_model, "intermediate_size": config.ffn_dim, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim,
        "max_position_embeddings": 128, "rms_norm_eps": config.norm_eps, "rope_parameters": rope,
        "vocab_size": config.vocab_size, "tie_word_embeddings": config.is_tied, "bos_token_id": 0, "eos_token_id": 0,
    } | more


def check_equal_logits_and_loss(ours, theirs) -> None:
    """Of the same weights, on rows as long as the model takes: 1e-5 in fp32."""
    config, tokens_BT = ours.config, random_tokens(ours.config, 3, ours.config.max_seq_len)
    expected = theirs(tokens_BT, labels=tokens_BT)
    torch.testing.assert_close(ours(tokens_BT)[..., : config.vocab_size], expected.logits, rtol=0, atol=1e-5)
    nll_sum = ours(tokens_BT[:, :-1], labels_BT=tokens_BT[:, 1:])
    assert abs((nll_sum / tokens_BT[:, 1:].numel() - expected.loss).item()) < 1e-5


def hf_twin(ours, hf_model):
    """The transformers model with our weights."""
    result = hf_model.eval().load_state_dict(to_hf(ours.config, dict(ours.named_parameters())), strict=False)
    assert result.unexpected_keys == []
    assert result.missing_keys == []
    return hf_model


@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize("kind", SCALINGS)
def test_scaled_frequencies_equal_transformers(kind, base):
    scaling = SCALINGS[kind]
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=4096, rope_parameters=hf_rope(scaling, base)
    )
    expected_c, length = ROPE_INIT_FUNCTIONS[scaling.kind](config, "cpu")
    torch.testing.assert_close(frequencies(64, base, scaling), expected_c, rtol=1e-6, atol=1e-9)
    assert score_length(scaling) == pytest.approx(length, rel=1e-6)


@pytest.mark.parametrize("kind", SCALINGS)
def test_a_llama_with_scaled_positions_equals_transformers(kind):
    config = ModelConfig(rope_scaling=SCALINGS[kind], **LLAMA)
    ours = randomized_model(config)
    check_equal_logits_and_loss(ours, hf_twin(ours, LlamaForCausalLM(LlamaConfig(**hf_shape(config)))))


def test_normalised_queries_and_keys_and_wide_heads_equal_qwen3():
    config = ModelConfig(qk_norm=True, head_width=24, **LLAMA)
    ours = randomized_model(config)
    check_equal_logits_and_loss(ours, hf_twin(ours, Qwen3ForCausalLM(Qwen3Config(**hf_shape(config)))))


def test_a_window_equals_mistral():
    config = ModelConfig(window=5, **LLAMA)
    ours = randomized_model(config)
    check_equal_logits_and_loss(
        ours, hf_twin(ours, MistralForCausalLM(MistralConfig(**hf_shape(config, sliding_window=5))))
    )


def test_local_and_global_blocks_equal_qwen3_with_layer_types():
    config = ModelConfig(window=5, global_every=2, **LLAMA)
    ours = randomized_model(config)
    types = ["sliding_attention", "full_attention"]
    hf_model = Qwen3ForCausalLM(Qwen3Config(
        **hf_shape(config, sliding_window=5, use_sliding_window=True, layer_types=types)))
    for layer in hf_model.model.layers:
        layer.self_attn.q_norm = layer.self_attn.k_norm = torch.nn.Identity()
    check_equal_logits_and_loss(ours, hf_twin(ours, hf_model))


def test_parallel_blocks_with_one_kv_head_equal_falcon():
    config = ModelConfig(family="palm", num_kv_heads=1, activation="gelu", d_ff=256, **SHAPE)
    ours = randomized_model(config)
    theirs = FalconForCausalLM(FalconConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, multi_query=True,
        parallel_attn=True, new_decoder_architecture=False, alibi=False, bias=False, bos_token_id=0, eos_token_id=0,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )).eval()
    names = {
        "norm": "input_layernorm", "attention.qkv": "self_attention.query_key_value",
        "attention.output": "self_attention.dense", "feed_forward.up": "mlp.dense_h_to_4h",
        "feed_forward.output": "mlp.dense_4h_to_h",
    }
    weights = {
        f"transformer.h.{index}.{theirs_name}.weight": ours.get_parameter(f"blocks.{index}.{name}.weight")
        for index in range(2) for name, theirs_name in names.items()
    }
    weights["transformer.word_embeddings.weight"] = ours.embedding.tokens.weight[:100]
    weights["lm_head.weight"] = ours.embedding.tokens.weight[:100] / 64**0.5
    weights["transformer.ln_f.weight"] = ours.final_norm.weight
    result = theirs.load_state_dict(weights, strict=False)
    assert result.unexpected_keys == []
    for name in result.missing_keys:
        assert name.endswith(("layernorm.bias", "ln_f.bias"))
        torch.nn.init.zeros_(theirs.get_parameter(name))
    check_equal_logits_and_loss(ours, theirs)


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_recompute_of_parallel_blocks_changes_no_bit(mode, dropout):
    config = ModelConfig(family="palm", num_kv_heads=1, dropout=dropout, **SHAPE)
    gradients = []
    for chosen in ("none", mode):
        model = build_model(config, seed=1)
        set_recompute(model, chosen)
        tokens_BT = random_tokens(config, 2, 24)
        keys_B = derive_row_keys(torch.arange(2), seed=1, step=0) if dropout else None
        context = build_context(config, 24, CPU, row_keys_B=keys_B)
        model(tokens_BT, context, tokens_BT).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


def heads(num_heads: int, num_positions: int, seed: int) -> torch.Tensor:
    """Shape: (2, T, H, 16), wide enough for FlexAttention, with scores that a cap of 2 bends."""
    return 2 * torch.randn(2, num_positions, num_heads, 16, generator=torch.Generator().manual_seed(seed))


def test_bent_scores_equal_gemma2():
    q, k, v = heads(4, 9, 1), heads(2, 9, 2), heads(2, 9, 3)
    mask = build_mask(cp_columns(9, ONE_RANK, CPU), None, 4, ONE_RANK, CPU)
    mixed = attend_row(q, k, v, mask, Scoring(scale=0.3, softcap=2.0))
    module = torch.nn.Module()
    module.config, module.num_key_value_groups, module.head_dim = Gemma2Config(), 2, 16
    hidden = torch.where(mask.dense_B1TS, 0.0, -torch.inf)
    by_head = (each.transpose(1, 2) for each in (q, k, v))
    expected, _ = eager_attention_forward(module, *by_head, hidden, scaling=0.3, softcap=2.0)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-5)
    assert (mixed - attend_row(q, k, v, mask, Scoring(scale=0.3))).abs().max() > 0.1


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("is_causal", [True, False])
def test_a_bias_is_added_to_the_scores_of_each_head(softcap, is_causal):
    q, k, v = heads(4, 7, 1), heads(2, 7, 2), heads(2, 7, 3)
    bias_HTS = torch.randn(4, 7, 7, generator=torch.Generator().manual_seed(4)).requires_grad_()
    mask = build_mask(cp_columns(7, ONE_RANK, CPU), None, None, ONE_RANK, CPU, is_causal=is_causal)
    mixed = attend_row(q, k, v, mask, Scoring(1.0, softcap, bias_HTS))
    scores = torch.einsum("bthc,bshc->bhts", q, k.repeat_interleave(2, dim=2)) + bias_HTS
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    if is_causal:
        scores = scores.masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), -torch.inf)
    expected = torch.einsum("bhts,bshc->bthc", scores.softmax(-1), v.repeat_interleave(2, dim=2))
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-5)
    found, wanted = (torch.autograd.grad(each.square().sum(), bias_HTS)[0] for each in (mixed, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_queries_may_read_another_number_of_keys():
    q, k, v = heads(4, 3, 1), heads(4, 5, 2), heads(4, 5, 3)
    seen = torch.tensor([[True, True, False, False, True], [True] * 5])[:, None, None].expand(2, 1, 3, 5)
    mask = AttentionMask(torch.arange(3), None, None, seen, None, is_causal=False)
    mixed = attend_row(q, k, v, mask)
    kept = k[:1, [0, 1, 4]], v[:1, [0, 1, 4]]
    everything = AttentionMask(torch.arange(3), None, None, None, None, is_causal=False)
    torch.testing.assert_close(mixed[:1], attend_row(q[:1], *kept, everything), rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[1:], attend_row(q[1:], k[1:], v[1:], everything), rtol=0, atol=1e-5)


def test_a_bent_tile_and_its_gradients_are_those_of_attention():
    q, k, v = (heads(num, 6, seed).transpose(1, 2).requires_grad_() for seed, num in enumerate((4, 2, 2)))
    mask = build_mask(cp_columns(6, ONE_RANK, CPU), None, None, ONE_RANK, CPU)
    mixed = attend_row(*(each.transpose(1, 2) for each in (q, k, v)), mask, Scoring(softcap=2.0)).transpose(1, 2)
    grad = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(9))
    expected = torch.autograd.grad(mixed, (q, k, v), grad)
    with torch.no_grad():
        tile, lse = tile_forward(q, k, v, is_causal=True, softcap=2.0)
        found = tile_backward(grad, q, k, v, tile, lse, is_causal=True, softcap=2.0)
    torch.testing.assert_close(tile, mixed, rtol=0, atol=1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_bent_logits_and_their_loss():
    config = ModelConfig(logit_softcap=3.0, **LLAMA)
    model, plain = randomized_model(config), randomized_model(config.model_copy(update={"logit_softcap": None}))
    tokens_BT = random_tokens(config, 2, 24)
    logits_BTV, free_BTV = model(tokens_BT)[..., :100], plain(tokens_BT)[..., :100]
    torch.testing.assert_close(logits_BTV, 3 * (free_BTV / 3).tanh(), rtol=0, atol=1e-5)
    assert model(tokens_BT)[..., 100:].max() == -torch.inf
    hidden_ND, weight_vD = (torch.randn(n, 8, generator=torch.Generator().manual_seed(n)).requires_grad_()
                            for n in (30, 128))
    labels_N = torch.arange(30)
    ours = linear_cross_entropy(hidden_ND, weight_vD, labels_N, 100, ALONE, softcap=2.0)
    theirs = F.cross_entropy(2 * (hidden_ND @ weight_vD[:100].T / 2).tanh(), labels_N, reduction="sum")
    torch.testing.assert_close(ours, theirs)
    found, expected = (torch.autograd.grad(loss, (hidden_ND, weight_vD)) for loss in (ours, theirs))
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


def refusal(model: dict, train: dict | None = None) -> str:
    config = parse_config({
        "run": {"name": "refused", "folder": "unused"}, "model": SHAPE | model, "data": {"folder": "unused"},
        "train": {"seq_len": 16, "micro_batch_size": 2, "global_batch_tokens": 32, "max_steps": 4} | (train or {}),
        "optimizer": {"learning_rate": 1e-3}, "checkpoint": {"interval_steps": 4},
        "evaluate": {"interval_steps": 4},
    }, source="here")
    with pytest.raises(ConfigError) as caught:
        check_config(config, 1, None)
    return str(caught.value)


def test_what_a_block_in_one_piece_cannot_do_is_refused():
    assert "model.bias = true with model.family = palm" in refusal({"family": "palm", "bias": True})
    half = {"recompute": "selective", "recompute_parts": ["attention"]}
    assert "its blocks have no halves" in refusal({"family": "palm"}, half)


@pytest.mark.parametrize("settings", [
    {"qk_norm": True, "window": 5, "global_every": 2}, {"qk_norm": True, "head_width": 24},
    {"rope_scaling": {"kind": "yarn", "factor": 4.0, "original_seq_len": 8}}, {"activation": "geglu", "window": 5},
], ids=lambda settings: "+".join(settings))
def test_the_exported_config_computes_the_same(settings):
    config = ModelConfig(**LLAMA | settings)
    ours, values = randomized_model(config), derive_hf_config(config, eos_id=0, dtype="float32")
    hf_config = AutoConfig.for_model(values["model_type"], **{k: v for k, v in values.items() if k != "model_type"})
    check_equal_logits_and_loss(ours, hf_twin(ours, AutoModelForCausalLM.from_config(hf_config)))


@pytest.mark.parametrize(("settings", "word"), [
    ({"family": "palm", "num_kv_heads": 1}, "blocks in one piece"),
    ({"attention_softcap": 9.0}, "attention_softcap = 9"),
    ({"logit_softcap": 9.0}, "logit_softcap = 9"), ({"window": 5, "global_every": 2}, "global_every = 2"),
    ({"qk_norm": True, "bias": True}, "qk_norm = true with model.bias"), ({"activation": "relu"}, "activation = relu"),
])
def test_what_no_class_computes_is_not_exported(settings, word):
    with pytest.raises(ConfigError, match=word):
        derive_hf_config(ModelConfig(**LLAMA | settings), eos_id=0, dtype="float32")


def test_a_ramp_the_wrong_way_round_is_refused():
    with pytest.raises(ValueError, match="low_freq_factor = 4 isn't under high_freq_factor = 4"):
        RopeScalingConfig(kind="llama3", factor=8.0, original_seq_len=64, low_freq_factor=4.0)
