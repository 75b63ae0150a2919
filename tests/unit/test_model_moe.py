"""The sparse layer against a reference that loops over tokens and experts, and its parts one by one."""

import re

import pytest
import torch
import torch.nn.functional as F

from megascale.config.load import parse_config
from megascale.config.model import ModelConfig
from megascale.config.validate import check_config
from megascale.errors import ConfigError
from megascale.model.axes import ONE_RANK
from megascale.model.context import build_context
from megascale.model.moe import balance, experts
from megascale.model.moe.dispatch import route
from megascale.model.moe.experts import GroupedLinear, grouped_outer, grouped_product
from megascale.model.moe.layer import MoeLayer
from megascale.model.moe.router import Router
from megascale.model.recompute import set_recompute
from megascale.model.transformer import build_model
from megascale.parallel.axis import ALONE

ROWS, POSITIONS, FACTOR = 3, 12, 0.25
KINDS = {
    "mixtral": {"num_experts": 4, "top_k": 2, "z_weight": 0.01},
    "switch": {"num_experts": 4, "top_k": 1, "normalize_scores": False, "capacity_factor": 1.0},
    "switch_roomy": {"num_experts": 4, "top_k": 1, "normalize_scores": False, "capacity_factor": 4.0},
    "dropping": {"num_experts": 4, "top_k": 2, "capacity_factor": 0.5},
    "deepseek": {"num_experts": 8, "top_k": 3, "d_expert": 8, "num_shared_experts": 2, "scores": "sigmoid",
                 "score_scale": 2.5, "balance": "bias"},
    "gelu": {"num_experts": 4, "top_k": 2},
}


def config_of(kind: str, **changes) -> ModelConfig:
    activation = {"activation": "gelu"} if kind == "gelu" else {}
    shape = {"num_layers": 2, "d_model": 16, "num_heads": 2, "d_ff": 24, "vocab_size": 61, "max_seq_len": 32}
    return ModelConfig(family="moe", moe=KINDS[kind] | changes, **shape, **activation)


def build_layer(config: ModelConfig, seed: int = 0) -> MoeLayer:
    layer, generator = MoeLayer(config, ONE_RANK), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        if layer.router.bias is not None:
            layer.router.bias.copy_(torch.randn(layer.router.bias.shape, generator=generator) * 0.3)
    return layer


def feed_forward(tokens: torch.Tensor, inner: torch.Tensor, output: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """One expert, from its own weights."""
    if config.is_gated:
        return (F.silu(tokens @ inner[0].T) * (tokens @ inner[1].T)) @ output.T
    return F.gelu(tokens @ inner.T) @ output.T


def reference(layer: MoeLayer, config: ModelConfig, hidden_BTD: torch.Tensor, labels_B: torch.Tensor):
    """Output and added loss, by loops: every expert sees every token, and a mask of gates picks."""
    moe, (num_rows, num_positions, _) = config.moe, hidden_BTD.shape
    logits = hidden_BTD @ layer.router.weight.T
    scores = logits.softmax(-1) if moe.scores == "softmax" else logits.sigmoid()
    ranked = scores if layer.router.bias is None else scores + layer.router.bias
    capacity = None
    if moe.capacity_factor is not None:
        capacity = -(-moe.capacity_factor * num_positions * moe.top_k // moe.num_experts)
    gates, chosen = torch.zeros_like(scores), torch.zeros_like(scores)
    for row in range(num_rows):
        taken = [0] * moe.num_experts
        for position in range(num_positions):
            best = ranked[row, position].argsort(descending=True)[: moe.top_k].tolist()
            total = sum(scores[row, position, expert] for expert in best) if moe.normalize_scores else 1.0
            for expert in best:
                chosen[row, position, expert] = 1
                taken[expert] += 1
                if capacity is None or taken[expert] <= capacity:
                    gates[row, position, expert] = moe.score_scale * scores[row, position, expert] / total
    inner = (layer.experts.gate_up if config.is_gated else layer.experts.up).weight
    output = sum(
        gates[..., expert, None] * feed_forward(hidden_BTD, inner[expert], layer.experts.output.weight[expert], config)
        for expert in range(moe.num_experts)
    )
    if layer.shared is not None:
        output = output + feed_forward(hidden_BTD, layer.shared.gate_up.weight, layer.shared.output.weight, config)
    shares = scores / scores.sum(-1, keepdim=True)
    balance_B = moe.num_experts / moe.top_k * (chosen.mean(1) * shares.mean(1)).sum(-1)
    z_B = logits.logsumexp(-1).square().mean(1)
    weight = moe.balance_weight if moe.balance == "loss" else 0.0
    return output, (labels_B * (weight * balance_B + moe.z_weight * z_B)).sum(), gates, chosen


def context_of(config: ModelConfig, labels_B: torch.Tensor | None, factor: float | None = FACTOR):
    loss_factor = None if factor is None else torch.tensor(factor)
    return build_context(config, POSITIONS, torch.device("cpu"), loss_factor=loss_factor, num_labels_B=labels_B)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_a_loop_over_experts(kind):
    config, generator = config_of(kind), torch.Generator().manual_seed(1)
    layer, labels_B = build_layer(config), torch.tensor([12, 0, 7])
    hidden = torch.randn(ROWS, POSITIONS, config.d_model, generator=generator, requires_grad=True)
    direction = torch.randn(hidden.shape, generator=generator)
    inputs = [hidden, *layer.parameters()]

    output = layer(hidden, context_of(config, labels_B))
    found = torch.autograd.grad((output * direction).sum(), inputs)
    expected_output, loss, gates, chosen = reference(layer, config, hidden, labels_B)
    expected = torch.autograd.grad((expected_output * direction).sum() + FACTOR * loss, inputs)

    torch.testing.assert_close(output, expected_output, rtol=1e-6, atol=1e-6)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6 * max(1.0, other.abs().max().item()))
    counts = layer.tally.counts_E
    assert counts[:-1].tolist() == chosen.sum((0, 1)).tolist()
    assert counts[-1] == chosen.sum() - (gates > 0).sum()
    assert (counts[-1] > 0) == (kind in ("switch", "dropping"))


def test_micro_batches_change_nothing():
    """Rows by themselves or together: the same outputs, gradients and tallies, with dropped tokens too."""
    config = config_of("dropping")
    hidden, labels_B = torch.randn(ROWS, POSITIONS, config.d_model), torch.tensor([12, 3, 7])
    together, apart = build_layer(config), build_layer(config)
    together(hidden, context_of(config, labels_B)).square().sum().backward()
    for row in range(ROWS):
        apart(hidden[row : row + 1], context_of(config, labels_B[row : row + 1])).square().sum().backward()
    for (name, one), other in zip(together.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6, msg=name)
    assert torch.equal(together.tally.counts_E, apart.tally.counts_E)
    torch.testing.assert_close(together.tally.sums_2, apart.tally.sums_2)


def test_nothing_is_added_or_counted_without_a_backward_pass():
    config = config_of("mixtral")
    layer, hidden = build_layer(config), torch.randn(1, POSITIONS, config.d_model)
    with torch.no_grad():
        layer(hidden, context_of(config, None))
    layer(hidden, context_of(config, None, factor=None)).sum().backward()
    assert layer.tally.counts_E.sum() == 0


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recompute_gives_the_same_gradients_and_counts_once(mode):
    config = config_of("mixtral")
    tokens = torch.randint(0, 61, (2, POSITIONS))
    grads, counts = [], []
    for chosen in ("none", mode):
        model = build_model(config, seed=3)
        set_recompute(model, chosen)
        model(tokens, context_of(config, torch.tensor([12, 12])), tokens).mul(FACTOR).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
        counts.append([block.feed_forward.tally.counts_E for block in model.layers[1:3]])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(*counts, strict=True))
    assert counts[0][0].sum() == 2 * POSITIONS * 2


def test_capacity_takes_the_first_of_a_row():
    experts_BAK = torch.tensor([[[0], [0], [1], [0]], [[1], [0], [0], [1]]])
    limited = balance.limit_rows(experts_BAK, torch.arange(4), 2, 1.0, ALONE)
    assert limited[..., 0].tolist() == [[0, 0, 1, 2], [1, 0, 0, 1]]


def test_balance_loss_is_one_when_even_and_more_when_not():
    even = balance.balance_of_rows(torch.full((1, 4, 4), 0.25), torch.full((1, 4), 2), 4, 2)
    uneven = balance.balance_of_rows(torch.tensor([[[0.7, 0.1, 0.1, 0.1]] * 4]), torch.tensor([[4, 2, 1, 1]]), 4, 2)
    assert even.item() == pytest.approx(1.0)
    assert uneven.item() > 1.0


def test_bias_moves_against_the_load_and_chooses_only():
    bias = torch.zeros(4)
    balance.move_bias(bias, torch.tensor([10, 2, 6, 6]), 0.5)
    assert bias.tolist() == [-0.5, 0.5, 0.0, 0.0]
    router = Router(config_of("deepseek"))
    torch.nn.init.normal_(router.weight)
    hidden = torch.randn(1, 5, 16)
    before = router(hidden)
    router.bias[2] = 10.0
    after = router(hidden)
    assert (after.experts_BTK == 2).any(-1).all()
    scores = after.logits_BTE.sigmoid().gather(-1, after.experts_BTK)
    torch.testing.assert_close(after.gates_BTK, 2.5 * scores / scores.sum(-1, keepdim=True))
    torch.testing.assert_close(before.shares_BTE, after.shares_BTE)


def test_bias_stays_fp32_where_a_model_is_cast():
    router = Router(config_of("deepseek"))
    router.bias[0] = 1.001
    router.to(torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    assert router.bias.dtype == torch.float32
    assert router.bias[0] == torch.tensor(1.001)


def test_an_expert_without_tokens_gets_a_gradient_of_zero():
    counts, inputs, weight = torch.tensor([0, 5, 0]), torch.randn(5, 4), torch.randn(3, 6, 4)
    torch.testing.assert_close(grouped_product(inputs, weight.transpose(1, 2), counts), inputs @ weight[1].T)
    grad = grouped_outer(torch.ones(5, 6), inputs, counts, weight.shape)
    assert grad[0].abs().sum() == grad[2].abs().sum() == 0
    assert grad[1].abs().sum() > 0


def test_route_without_any_kept_pair_gives_zero():
    output = route(lambda tokens, counts: tokens, torch.randn(3, 4), torch.full((3, 1), 2), torch.ones(3, 1), 2, ALONE,
                   may_drop=True)
    assert output.shape == (3, 4)
    assert output.abs().sum() == 0


@pytest.mark.parametrize(("num_dense_layers", "every", "sparse"), [
    (0, 1, [0, 1, 2, 3, 4]), (0, 2, [1, 3]), (2, 2, [3]),
])
def test_which_blocks_are_sparse(num_dense_layers, every, sparse):
    config = config_of("mixtral", num_dense_layers=num_dense_layers, every=every).model_copy(update={"num_layers": 5})
    assert config.sparse_blocks == sparse
    model = build_model(config, seed=1)
    blocks = enumerate(model.layers[1:6])
    assert [number for number, block in blocks if isinstance(block.feed_forward, MoeLayer)] == sparse


@pytest.mark.parametrize(("moe", "other", "told"), [
    ({"top_k": 5}, {}, "top_k = 5 is more than model.moe.num_experts = 4"),
    ({"top_k": 1}, {}, "normalize_scores = true with top_k 1"),
    ({"num_dense_layers": 2}, {}, "leave none of 2 blocks sparse"),
    ({}, {"model": {"bias": True}}, "experts have no biases"),
    ({}, {"train": {"compile": True}}, "train.compile with family moe"),
    ({"d_expert": 9}, {"parallel": {"tp": 2}}, "parallel.tp = 2 does not divide the width of an expert, 9"),
])
def test_what_cannot_be_is_refused_by_name(moe, other, told):
    shape = {"num_layers": 2, "d_model": 16, "num_heads": 2, "d_ff": 24, "vocab_size": 61, "max_seq_len": 32}
    config = parse_config({
        "run": {"name": "moe", "folder": "unused"}, "data": {"folder": "unused"},
        "model": {"family": "moe", "moe": {"num_experts": 4} | moe} | shape | other.get("model", {}),
        "train": {"seq_len": 16, "micro_batch_size": 1, "global_batch_tokens": 64, "max_steps": 4}
        | other.get("train", {}),
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1}, "parallel": other.get("parallel", {}),
        "evaluate": {"interval_steps": 4}, "checkpoint": {"interval_steps": 4},
    }, source="moe")
    with pytest.raises(ConfigError, match=re.escape(told)):
        check_config(config, 2, "moe")


@pytest.mark.parametrize("counts", [[5, 0, 7], [0, 0, 12]])
def test_the_grouped_kernel_is_called_as_it_wants_and_gives_the_loops_numbers(monkeypatch, counts):
    """torch's code for CPUs behind the same call. Seen to catch: weights not transposed, offsets that begin at 0."""
    layer = GroupedLinear(3, 16, 2, 8)
    torch.nn.init.normal_(layer.weight)
    tokens, counts_e = torch.randn(12, 16, requires_grad=True), torch.tensor(counts)
    results = []
    for has_kernel in (False, True):
        monkeypatch.setattr(experts, "has_grouped_kernel", lambda *_, has_kernel=has_kernel: has_kernel)
        layer.weight.grad = tokens.grad = None
        outputs = layer(tokens, counts_e)
        (outputs * torch.arange(16.0)).square().sum().backward()
        results.append((outputs.detach(), tokens.grad, layer.weight.grad))
    for looped, grouped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, looped, rtol=1e-5, atol=1e-5)
