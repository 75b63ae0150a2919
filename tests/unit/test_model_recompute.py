"""Recompute: the same loss and gradients to the bit, and less memory in the right order."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megascale.config.model import ModelConfig
from megascale.model.context import build_context
from megascale.model.dropout import derive_row_keys
from megascale.model.loss import token_loss
from megascale.model.recompute import set_recompute
from megascale.model.transformer import build_model

SHAPE = {"num_layers": 2, "d_model": 64, "num_heads": 4, "vocab_size": 64, "max_seq_len": 32, "dropout": 0.1}
CONFIGS = [ModelConfig(family="gpt2", **SHAPE), ModelConfig(family="llama", num_kv_heads=2, **SHAPE)]


def loss_and_gradients(model, mode):
    set_recompute(model, mode)
    model.zero_grad()
    tokens_BT = torch.randint(0, 64, (2, 33), generator=torch.Generator().manual_seed(1))
    context = build_context(model.config, 32, tokens_BT.device, row_keys_B=derive_row_keys(torch.arange(2), 1, 1))
    nll_sum, _ = token_loss(model(tokens_BT[:, :-1], context), tokens_BT[:, 1:])
    torch.rand(3)  # a random state that moves must not matter
    nll_sum.backward()
    return nll_sum.item(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("config", CONFIGS, ids=["gpt2", "llama"])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_gradients_equal_to_the_bit(config, mode):
    """Caught by a mutation that draws the masks with torch.rand: the second forward pass then drops other features."""
    model = build_model(config, seed=1)
    expected_loss, expected = loss_and_gradients(model, "none")
    loss, gradients = loss_and_gradients(model, mode)
    assert loss == expected_loss
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


class OperatorCounter(TorchDispatchMode):
    """Counts the operators that are really computed."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.counts[operator.overloadpacket.__name__] += 1
        return operator(*args, **(kwargs or {}))


def count_operators(model, mode):
    """How often each operator runs in a step."""
    with OperatorCounter() as counter:
        loss_and_gradients(model, mode)
    return counter.counts


def test_what_runs_twice():
    model = build_model(CONFIGS[1], seed=1)
    none, selective, full = (count_operators(model, mode) for mode in ("none", "selective", "full"))
    for operator in ("_scaled_dot_product_flash_attention_for_cpu", "silu", "roll"):
        assert selective[operator] - none[operator] == full[operator] - none[operator] > 0
    assert selective["mm"] == none["mm"]
    assert full["mm"] == none["mm"] + 2 * 4


def test_kept_memory_falls_with_the_mode():
    model = build_model(CONFIGS[1], seed=1)
    kept = {mode: kept_bytes(model, mode) for mode in ("none", "full")}
    assert kept["full"] < kept["none"] / 3


def kept_bytes(model, mode):
    """Bytes of distinct tensors that the forward pass of the blocks saves for backward, parameters excluded."""
    set_recompute(model, mode)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    context = build_context(model.config, 32, torch.device("cpu"), row_keys_B=torch.arange(4))
    hidden_BTD = torch.randn(4, 32, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        for layer in model.layers[1:-2]:
            hidden_BTD = layer(hidden_BTD, context)
    return sum(sizes.values())
