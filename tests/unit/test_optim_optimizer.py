"""Parameter groups, and each optimizer against another's or the paper's own."""

import pytest
import torch
from torch.nn import Parameter

from megascale.config.model import ModelConfig
from megascale.config.optimizer import OptimizerConfig
from megascale.errors import ConfigError
from megascale.model.matrices import is_hidden_matrix, is_matrix, split_fused
from megascale.model.sharding import is_decayed
from megascale.model.transformer import build_model
from megascale.optim.groups import ParameterFacts, parameter_groups
from megascale.optim.muon import orthogonal
from megascale.optim.optimizer import build_optimizer
from megascale.optim.state import EMA, state_shapes

SHAPES = {
    "blocks.0.attention.output.weight": (6, 4), "blocks.0.feed_forward.up.weight": (4, 10),
    "blocks.0.feed_forward.output.weight": (8, 8), "final_norm.weight": (5,),
}
STEPS = 10


def config_of(kind: str, **settings) -> OptimizerConfig:
    return OptimizerConfig(kind=kind, **{"learning_rate": 0.01, "weight_decay": 0.1} | settings)


def facts_of(names_and_shapes, kind: str) -> dict[str, ParameterFacts]:
    is_treated = is_hidden_matrix if kind == "muon" else is_matrix
    return {name: ParameterFacts(is_decayed(name), is_treated(name, shape)) for name, shape in names_and_shapes}


def make_parameters(shapes=SHAPES) -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(3)
    return {name: Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def train(optimizer, parameters: dict[str, Parameter], steps: int = STEPS) -> None:
    """Steps on gradients that depend on the step alone, of very different sizes."""
    generator = torch.Generator().manual_seed(4)
    for step in range(steps):
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator) * 10.0 ** (step % 3 - 2)
        optimizer.step()


def own_run(config: OptimizerConfig, shapes=SHAPES, is_fp32: bool = True):
    parameters = make_parameters(shapes)
    groups = parameter_groups(parameters.items(), facts_of(shapes.items(), config.kind), config)
    optimizer = build_optimizer(groups, config, split_parts=lambda name, tensor: [tensor], is_fp32=is_fp32)
    train(optimizer, parameters)
    return parameters, optimizer


def reference_groups(parameters: dict[str, Parameter]) -> list[dict]:
    matrices = [parameter for parameter in parameters.values() if parameter.dim() > 1]
    vectors = [parameter for parameter in parameters.values() if parameter.dim() == 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


def assert_equal(found: dict[str, Parameter], expected: dict[str, Parameter], tolerance: float = 1e-6) -> None:
    before = make_parameters()
    for name, parameter in found.items():
        assert not torch.allclose(parameter, before[name], atol=1e-3), "the steps must change something"
        torch.testing.assert_close(parameter, expected[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_matrices_decay_and_the_rest_does_not(family):
    config = ModelConfig(family=family, num_layers=2, d_model=32, num_heads=2, vocab_size=50, max_seq_len=16)
    model = build_model(config, seed=1)
    shapes = [(name, parameter.shape) for name, parameter in model.named_parameters()]
    decayed, kept = parameter_groups(model.named_parameters(), facts_of(shapes, "adamw"), config_of("adamw"))
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert all(parameter.dim() >= 2 for parameter in decayed["params"])
    assert all(parameter.dim() == 1 for parameter in kept["params"])
    order = [id(parameter) for parameter in model.parameters()]
    for group in (decayed, kept):
        places = [order.index(id(parameter)) for parameter in group["params"]]
        assert places == sorted(places)
    assert len(decayed["params"]) + len(kept["params"]) == len(order)


def test_an_empty_group_stays():
    """A pipeline stage without norms, of a model that has some."""
    facts = facts_of([("head.weight", (2, 2)), ("final_norm.weight", (2,))], "adamw")
    groups = parameter_groups([("head.weight", Parameter(torch.ones(2, 2)))], facts, config_of("adamw"))
    assert [len(group["params"]) for group in groups] == [1, 0]


def test_groups_of_the_config():
    """The first pattern counts; what it leaves open stays; muon's matrices have groups of their own."""
    config = config_of("muon", groups=(
        {"match": "*.output.weight", "lr_factor": 0.5}, {"match": "blocks.*", "weight_decay": 0.3},
    ))
    parameters = make_parameters(SHAPES | {"head.weight": (3, 4)})
    facts = facts_of([(name, parameter.shape) for name, parameter in parameters.items()], "muon")
    groups = parameter_groups(parameters.items(), facts, config)
    found = {name: (group["lr_factor"], group["weight_decay"], group["is_matrix"])
             for group in groups for name in group["names"]}
    assert found == {
        "blocks.0.attention.output.weight": (0.5, 0.1, True), "blocks.0.feed_forward.output.weight": (0.5, 0.1, True),
        "blocks.0.feed_forward.up.weight": (1.0, 0.3, True), "final_norm.weight": (1.0, 0.0, False),
        "head.weight": (1.0, 0.1, False),
    }
    with pytest.raises(ConfigError, match=r"groups\[0\].match = blocs.\* fits none of the model's 5 parameters"):
        parameter_groups(parameters.items(), facts, config_of("muon", groups=({"match": "blocs.*"},)))


def test_adamw_by_hand():
    """Steps of the paper's algorithm 2, written out."""
    found, _ = own_run(config_of("adamw"))
    expected = make_parameters()
    for parameter in expected.values():
        parameter.moments = [torch.zeros_like(parameter), torch.zeros_like(parameter)]

    class ByHand:
        steps = 0

        @torch.no_grad()
        def step(self) -> None:
            self.steps += 1
            for parameter in expected.values():
                first, second = parameter.moments
                first.mul_(0.9).add_(0.1 * parameter.grad)
                second.mul_(0.95).add_(0.05 * parameter.grad**2)
                update = first / (1 - 0.9**self.steps) / ((second / (1 - 0.95**self.steps)).sqrt() + 1e-8)
                parameter.sub_(0.01 * (update + (0.1 * parameter if parameter.dim() > 1 else 0.0)))

    train(ByHand(), expected)
    assert_equal(found, expected)


def test_lion_by_hand():
    """Chen et al. 2023, algorithm 2, line by line."""
    found, _ = own_run(config_of("lion", beta1=0.9, beta2=0.99))
    expected, momenta = make_parameters(), {}

    class ByHand:
        @torch.no_grad()
        def step(self) -> None:
            for name, parameter in expected.items():
                momentum = momenta.get(name, torch.zeros_like(parameter))
                update = torch.sign(0.9 * momentum + 0.1 * parameter.grad)
                momenta[name] = 0.99 * momentum + 0.01 * parameter.grad
                parameter.sub_(0.01 * (update + (0.1 * parameter if parameter.dim() > 1 else 0.0)))

    train(ByHand(), expected)
    assert_equal(found, expected)


def test_adafactor_as_in_torch():
    found, _ = own_run(config_of("adafactor"))
    expected = make_parameters()
    train(torch.optim.Adafactor(reference_groups(expected), lr=0.01, eps=(1e-15, 1e-3)), expected)
    assert_equal(found, expected)


def test_adafactor_as_in_transformers():
    adafactor = pytest.importorskip("transformers").Adafactor
    found, _ = own_run(config_of("adafactor", weight_decay=0.0))
    expected = make_parameters()
    optimizer = adafactor(list(expected.values()), lr=0.01, scale_parameter=True, relative_step=False)
    train(optimizer, expected)
    assert_equal(found, expected)


def test_muon_as_in_torch():
    """Matrices by torch's Muon, which computes in bf16; the vector by AdamW."""
    found, _ = own_run(config_of("muon"), is_fp32=False)
    expected = make_parameters()
    matrices, vectors = reference_groups(expected)
    muon = torch.optim.Muon([matrices], lr=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([vectors], lr=0.01, betas=(0.9, 0.95))

    class Both:
        def step(self) -> None:
            muon.step()
            adamw.step()

    train(Both(), expected)
    assert_equal(found, expected)


def test_orthogonal_matrices():
    """Singular values near 1 and the same singular vectors, for both shapes and for stacks."""
    generator = torch.Generator().manual_seed(1)
    for shape in [(6, 9), (9, 6), (3, 8, 5)]:
        matrices = torch.randn(shape, generator=generator)
        found = orthogonal(matrices)
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.3
        assert values.max() < 1.3
        u, _, v = torch.linalg.svd(matrices, full_matrices=False)
        inner = u.mT @ found @ v.mT
        assert (inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-3


def test_fused_matrices_are_updated_one_by_one():
    """Muon on a fused weight is Muon on queries, keys and values apart; a stack's matrices don't mix."""
    model = ModelConfig(family="llama", num_layers=1, d_model=8, num_heads=4, num_kv_heads=2,
                        vocab_size=9, max_seq_len=4)
    shapes = {"blocks.0.attention.qkv.weight": (16, 8), "blocks.0.feed_forward.gate_up.weight": (2, 6, 8)}
    config, parameters = config_of("muon"), make_parameters(shapes)
    queries = [row for row in range(16) if row // 2 % 4 < 2]
    rows = {"q": queries, "k": [4, 5, 12, 13], "v": [6, 7, 14, 15]}
    whole = {name: parameter.detach() for name, parameter in parameters.items()}
    apart = {f"blocks.{part}.w.output.weight": Parameter(whole["blocks.0.attention.qkv.weight"][index].clone())
             for part, index in rows.items()}
    apart |= {f"blocks.{i}.g.output.weight": Parameter(whole["blocks.0.feed_forward.gate_up.weight"][i].clone())
              for i in (0, 1)}
    gradients = {name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5))
                 for name, tensor in whole.items()}
    qkv, gate_up = gradients.values()
    parts = [*(qkv[index] for index in rows.values()), *gate_up.clone()]
    for each, grads, split in (
        (parameters, gradients.values(), lambda name, tensor: split_fused(name, tensor, model)),
        (apart, parts, lambda name, tensor: [tensor]),
    ):
        for parameter, gradient in zip(each.values(), grads, strict=True):
            parameter.grad = gradient.clone()
        facts = {name: ParameterFacts(decays=True, is_matrix=True) for name in each}
        build_optimizer(parameter_groups(each.items(), facts, config), config, split_parts=split, is_fp32=True).step()
    found_qkv, found_gate_up = parameters.values()
    for (_, index), expected in zip(rows.items(), apart.values(), strict=False):
        torch.testing.assert_close(found_qkv[index], expected)
    for found, expected in zip(found_gate_up, list(apart.values())[3:], strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["adamw", "lion"])
def test_average_of_weights(kind):
    """After each update the average moves an eighth of the way to the weights; it begins with them."""
    config = config_of(kind, ema_decay=0.875)
    parameters = make_parameters()
    expected = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    groups = parameter_groups(parameters.items(), facts_of(SHAPES.items(), kind), config)
    optimizer = build_optimizer(groups, config, split_parts=lambda name, tensor: [tensor], is_fp32=True)
    for _ in range(3):
        train(optimizer, parameters, steps=1)
        for name, parameter in parameters.items():
            expected[name] = 0.875 * expected[name] + 0.125 * parameter.detach()
    for name, parameter in parameters.items():
        torch.testing.assert_close(optimizer.state[parameter][EMA], expected[name])


@pytest.mark.parametrize(("kind", "factor"), [("adamw", 2), ("lion", 1), ("muon", 1), ("adafactor", 0)])
def test_state_of_a_matrix(kind, factor):
    """What import writes and memory counts is what the optimizer keeps."""
    config = config_of(kind, ema_decay=0.5)
    _, optimizer = own_run(config)
    name, shape = "blocks.0.feed_forward.up.weight", (4, 10)
    shapes = state_shapes(config, shape, is_matrix=kind in ("muon", "adafactor"))
    assert list(shapes.values()).count(shape) == factor + 1
    assert set(shapes) - {EMA} == {
        "adamw": {"exp_avg", "exp_avg_sq"}, "lion": {"exp_avg"}, "muon": {"momentum"}, "adafactor": {"row", "column"},
    }[kind]
    if kind == "adafactor":
        assert (shapes["row"], shapes["column"]) == ((4,), (10,))
        (group,) = [group for group in optimizer.param_groups if name in group["names"]]
        (tensor,) = [tensor for tensor in group["whole_tensors"] if tensor.name == name]
        assert {kind: tuple(factor.shape) for kind, factor in tensor.state.items()} == {"row": (4,), "column": (10,)}
