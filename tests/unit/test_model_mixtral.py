"""Logits, loss, router losses and files against MixtralForCausalLM of transformers."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from megascale.config.model import ModelConfig
from megascale.errors import ConfigError
from megascale.export.hf_config import derive_hf_config
from megascale.export.hf_import import differences, model_section
from megascale.model.context import build_context
from megascale.model.families.hf_names import from_hf, to_hf
from megascale.model.transformer import build_model

SHAPE = {"family": "moe", "d_model": 64, "num_heads": 4, "num_kv_heads": 2, "d_ff": 48, "vocab_size": 100,
         "max_seq_len": 24}
MOE = {"num_experts": 4, "top_k": 2}


def config_of(num_layers: int, **moe) -> ModelConfig:
    return ModelConfig(num_layers=num_layers, moe=MOE | moe, **SHAPE)


def randomized_model(config):
    model, generator = build_model(config, seed=1), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
            if name in ("embedding.tokens.weight", "head.weight"):
                parameter[config.vocab_size :] = 0
    return model


def save_as_mixtral(config, model, folder):
    """The model as a Hugging Face folder, as transformers itself reads it."""
    (folder / "config.json").write_text(json.dumps(derive_hf_config(config, eos_id=0, dtype="float32")))
    tensors = to_hf(config, dict(model.named_parameters()))
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})
    return tensors


def test_logits_and_loss_equal_transformers(tmp_path):
    config = config_of(2)
    ours = randomized_model(config)
    exported = save_as_mixtral(config, ours, tmp_path)
    theirs, report = MixtralForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(theirs.config, MixtralConfig)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]

    tokens_BT = torch.randint(0, 100, (3, 24), generator=torch.Generator().manual_seed(3))
    expected = theirs.eval()(tokens_BT, labels=tokens_BT)
    torch.testing.assert_close(ours(tokens_BT)[..., :100], expected.logits, rtol=0, atol=1e-5)
    nll_sum = ours(tokens_BT[:, :-1], labels_BT=tokens_BT[:, 1:])
    assert abs((nll_sum / tokens_BT[:, 1:].numel() - expected.loss).item()) < 1e-5

    parameters = dict(ours.named_parameters())
    back = from_hf(config, parameters, exported)
    assert all(torch.equal(back[name], parameter) for name, parameter in parameters.items())


def test_balance_loss_is_theirs_over_top_k():
    """One layer and one row: there the definitions coincide, but for the factor."""
    config = config_of(1)
    model, tokens_BT = randomized_model(config), torch.randint(0, 100, (1, 24))
    layer, logits = model.layers[1].feed_forward, []
    layer.router.register_forward_hook(lambda module, inputs, choice: logits.append(choice.logits_BTE))
    context = build_context(config, 24, torch.device("cpu"), loss_factor=torch.tensor(1.0))
    model(tokens_BT, context, tokens_BT).backward()
    expected = load_balancing_loss_func((logits[0].flatten(0, 1).detach(),), 4, 2)
    torch.testing.assert_close(layer.tally.sums_2[0] / 24, expected / 2)


@pytest.mark.parametrize("changes", [
    {"num_shared_experts": 1}, {"scores": "sigmoid"}, {"capacity_factor": 1.0}, {"balance": "bias"}, {"every": 2},
    {"normalize_scores": False}, {"score_scale": 2.0},
])
def test_what_mixtral_has_not_is_refused_by_name(changes):
    (name,) = changes
    with pytest.raises(ConfigError, match=f"MixtralForCausalLM has no .*{name}"):
        derive_hf_config(config_of(2, **changes), eos_id=0, dtype="float32")


def test_config_comes_back_and_a_difference_is_told():
    config = config_of(2)
    section = model_section(derive_hf_config(config, eos_id=0, dtype="float32"), "config.json")
    assert differences(section, config, {}) == []
    (told,) = differences(section, config_of(2, top_k=1, normalize_scores=True), {})
    assert "model.moe" in told
    assert '"top_k": 2' in told
