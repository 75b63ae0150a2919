"""Decay groups and AdamW."""

import pytest
import torch

from megascale.config.model import ModelConfig
from megascale.model.sharding import is_decayed
from megascale.model.transformer import build_model
from megascale.optim.optimizer import build_adamw, parameter_groups


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_matrices_decay_and_the_rest_does_not(family):
    config = ModelConfig(family=family, num_layers=2, d_model=32, num_heads=2, vocab_size=50, max_seq_len=16)
    model = build_model(config, seed=1)
    decayed, kept = parameter_groups(model.named_parameters(), 0.1, is_decayed)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert all(parameter.dim() >= 2 for parameter in decayed["params"])
    assert all(parameter.dim() == 1 for parameter in kept["params"])
    order = [id(parameter) for parameter in model.parameters()]
    for group in (decayed, kept):
        places = [order.index(id(parameter)) for parameter in group["params"]]
        assert places == sorted(places)
    assert len(decayed["params"]) + len(kept["params"]) == len(order)


def test_an_empty_group_stays():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    groups = parameter_groups([("head.weight", weight)], 0.1, is_decayed)
    assert [len(group["params"]) for group in groups] == [1, 0]
    assert len(build_adamw(groups, learning_rate=0.1, beta1=0.9, beta2=0.95, eps=1e-8).param_groups) == 2


def test_an_update_by_hand():
    """Two steps of the paper's algorithm 2, written out."""
    values = torch.tensor([1.0, -2.0, 3.0])
    gradients = [torch.tensor([0.5, 0.1, -0.2]), torch.tensor([-0.3, 0.4, 0.0])]
    weight = torch.nn.Parameter(values.clone())
    optimizer = build_adamw(
        [{"params": [weight], "weight_decay": 0.1}], learning_rate=0.01, beta1=0.9, beta2=0.95, eps=1e-8
    )
    first, second = torch.zeros(3), torch.zeros(3)
    for step, gradient in enumerate(gradients, start=1):
        weight.grad = gradient.clone()
        optimizer.step()
        first = 0.9 * first + 0.1 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        update = first / (1 - 0.9**step) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
        values = values - 0.01 * (update + 0.1 * values)
    torch.testing.assert_close(weight.detach(), values)
