"""Recompute and offload: the same loss and gradients to the bit, and less memory in the right order.

Mutations seen to be caught: the policy that keeps every product, and the one that keeps none; `parts` and `every`
ignored; dropout forgotten by the policy; parameters offloaded too.
"""

from collections import Counter

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from megascale.config.model import ModelConfig
from megascale.model import recompute
from megascale.model.block import Block
from megascale.model.context import build_context
from megascale.model.dropout import derive_row_keys
from megascale.model.recompute import MemoryPlan, Mover, set_recompute
from megascale.model.transformer import build_model, compile_blocks

SHAPE = {"num_layers": 2, "d_model": 64, "num_heads": 4, "vocab_size": 64, "max_seq_len": 32}
GPT2 = ModelConfig(family="gpt2", dropout=0.1, **SHAPE)
LLAMA = ModelConfig(family="llama", num_kv_heads=2, d_ff=160, **SHAPE)
PLANS = [
    {"mode": "selective"},
    {"mode": "selective", "parts": ["attention"]},
    {"mode": "selective", "parts": ["feed_forward"]},
    {"mode": "full"},
    {"mode": "full", "every": 2},
    {"mode": "none", "offload": True},
    {"mode": "selective", "offload": True},
    {"mode": "full", "offload": True},
]


def loss_and_gradients(model, mode="none", **options):
    set_recompute(model, mode, **options)
    model.zero_grad()
    tokens_BT = torch.randint(0, 64, (2, 33), generator=torch.Generator().manual_seed(1))
    keys_B = derive_row_keys(torch.arange(2), 1, 1) if model.config.dropout else None
    context = build_context(model.config, 32, tokens_BT.device, row_keys_B=keys_B)
    nll_sum = model(tokens_BT[:, :-1], context, tokens_BT[:, 1:])
    torch.rand(3)  # a random state that moves must not matter
    nll_sum.backward()
    return nll_sum.item(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_gradients_equal_to_the_bit(config, plan):
    """Caught by a mutation that draws the masks with torch.rand: the second forward pass then drops other features."""
    model = build_model(config, seed=1)
    expected_loss, expected = loss_and_gradients(model)
    loss, gradients = loss_and_gradients(model, **plan)
    assert loss == expected_loss
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_compiled_blocks_recompute_too(plan):
    model = build_model(GPT2, seed=1)
    expected_loss, expected = loss_and_gradients(model)
    torch.compiler.reset()
    compile_blocks(model, backend="aot_eager")
    loss, gradients = loss_and_gradients(model, **plan)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-4, atol=1e-5)


def test_the_plan_of_each_block():
    model = build_model(GPT2.model_copy(update={"num_layers": 5}), seed=1, stages=[[2, 3, 4, 5]])
    set_recompute(model, "full", every=3, offload=True)
    plans = [(name, module.memory) for name, module in model.named_modules() if isinstance(module, Block)]
    assert [(name, plan.mode) for name, plan in plans] == [
        ("blocks.1", "none"), ("blocks.2", "none"), ("blocks.3", "full"), ("blocks.4", "none")
    ]
    assert all(plan.is_offloaded for _, plan in plans)
    assert MemoryPlan() == MemoryPlan("none", ("attention", "feed_forward"), False)


class OperatorCounter(TorchDispatchMode):
    """Counts the operators that are really computed, and knows the storages of what they made."""

    def __init__(self):
        super().__init__()
        self.counts, self.made = Counter(), {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.counts[operator.overloadpacket.__name__] += 1
        result = operator(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                self.made[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def kept_bytes(self, but):
        """Bytes of what is still there, without some tensors of which results are views."""
        left_out = {tensor.untyped_storage().data_ptr() for tensor in but}
        return sum(
            num_bytes for address, (reference, num_bytes) in self.made.items()
            if address not in left_out and not reference.expired()
        )


def count_operators(model, mode, **options):
    """How often each operator runs in a step."""
    with OperatorCounter() as counter:
        loss_and_gradients(model, mode, **options)
    return counter.counts


ATTENTION, ACTIVATION = ("_scaled_dot_product_flash_attention_for_cpu", "cat"), ("silu",)
"""Operators that only one half of a block has."""


def test_what_runs_twice():
    model = build_model(LLAMA, seed=1)
    none, selective, full = (count_operators(model, mode) for mode in ("none", "selective", "full"))
    for operator in (ATTENTION[0], *ACTIVATION):
        assert selective[operator] - none[operator] == full[operator] - none[operator] == 2
    assert selective["mm"] == none["mm"]
    assert full["mm"] == none["mm"] + 2 * 3, "the last product of a block is not read by its backward pass"


@pytest.mark.parametrize(("part", "once", "twice"), [
    ("attention", ACTIVATION[0], ATTENTION[0]), ("feed_forward", ATTENTION[0], ACTIVATION[0])
])
def test_selective_covers_the_halves_asked_for(part, once, twice):
    model = build_model(LLAMA, seed=1)
    none, found = count_operators(model, "none"), count_operators(model, "selective", parts=[part])
    assert found[once] == none[once]
    assert found[twice] == none[twice] + 2


def test_every_second_block_runs_twice():
    model = build_model(LLAMA, seed=1)
    none, found = count_operators(model, "none"), count_operators(model, "full", every=2)
    assert found["silu"] == none["silu"] + 1


def kept_numbers(mode, dropout, **options):
    """Numbers per position and block that the forward pass keeps for backward."""
    model = build_model(LLAMA.model_copy(update={"dropout": dropout}), seed=1)
    set_recompute(model, mode, **options)
    keys_B = torch.arange(4) if dropout else None
    context = build_context(model.config, 32, torch.device("cpu"), row_keys_B=keys_B)
    hidden_BTD = torch.randn(4, 32, 64, requires_grad=True)
    with OperatorCounter() as counter:
        for module in model.modules():
            if isinstance(module, Block):
                hidden_BTD = module(hidden_BTD, context)
    return counter.kept_bytes(but=model.parameters()) / 4 / (2 * 4 * 32)


def test_kept_memory_is_what_the_table_says():
    """Products: queries, keys and values 2 D; gate and up 2 F. The last block's output stands for the first's input."""
    width, inner = 64, 160
    assert kept_numbers("full", 0.0) == width
    assert kept_numbers("selective", 0.0) == 2 * width + 2 * width + 2 * inner
    assert kept_numbers("selective", 0.1) == 2 * width + 2 * width + 2 * inner + 2 * width
    none = kept_numbers("none", 0.0)
    assert none > kept_numbers("selective", 0.0, parts=["attention"]) > kept_numbers("selective", 0.0)
    assert none > kept_numbers("full", 0.0, every=2) > kept_numbers("full", 0.0)


def test_what_is_moved(monkeypatch):
    """Activations are; parameters, views of them, what all blocks share and small tensors are not."""
    monkeypatch.setattr(recompute, "MIN_OFFLOAD_BYTES", 1024)
    shared, weight = torch.randn(1024), torch.nn.Parameter(torch.randn(32, 32))
    mover = Mover({shared.data_ptr()}, torch.device("cpu"))
    stays = [shared, weight, weight.t(), torch.randn(255)]
    assert [mover.moves(tensor) for tensor in stays] == [False] * 4
    assert mover.moves(torch.randn(256))
