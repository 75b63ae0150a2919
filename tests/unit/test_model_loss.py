"""The loss: the plain operators' sum and gradients, without ever making all logits.

Mutations seen to be caught: the chunks' weight gradients overwritten instead of added; padding left in the softmax;
ignored labels learnt from; the label's column left without its -1; in fp16 the logits' gradient left without its scale;
the factor of the backward pass rounded to half precision; all rows in one chunk.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megascale.config.model import ModelConfig
from megascale.config.optimizer import OptimizerConfig
from megascale.model import loss as module
from megascale.model.loss import linear_cross_entropy
from megascale.model.transformer import build_model
from megascale.optim.groups import ParameterFacts, parameter_groups
from megascale.optim.optimizer import build_optimizer
from megascale.parallel.axis import Axis

SHAPE = {"num_layers": 1, "d_model": 32, "num_heads": 2, "vocab_size": 50, "max_seq_len": 16}
ROWS, FEATURES, COLUMNS, VOCAB_SIZE = 53, 24, 64, 61
"""Positions, features, padded and real vocabulary."""


def factors(dtype=torch.float32, seed=1):
    """(hidden, weight, labels); every seventh label is ignored, and the last id is among the rest."""
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(ROWS, FEATURES, generator=generator).to(dtype).requires_grad_()
    weight_VD = torch.randn(COLUMNS, FEATURES, generator=generator).to(dtype).requires_grad_()
    labels_N = torch.randint(0, VOCAB_SIZE, (ROWS,), generator=generator)
    labels_N[::7], labels_N[1] = -100, VOCAB_SIZE - 1
    return hidden_ND, weight_VD, labels_N


def plain_loss(hidden_ND, weight_VD, labels_N, vocab_size=VOCAB_SIZE):
    """The reference, in the inputs' own dtype."""
    return F.cross_entropy(F.linear(hidden_ND, weight_VD)[:, :vocab_size], labels_N, reduction="sum")


def fused_loss(hidden_ND, weight_VD, labels_N):
    return linear_cross_entropy(hidden_ND, weight_VD, labels_N, VOCAB_SIZE, Axis())


def gradients(loss, factor=0.1):
    """Of a loss of `factors`, which the caller keeps."""
    def of(hidden_ND, weight_VD, labels_N):
        return torch.autograd.grad(loss(hidden_ND, weight_VD, labels_N) * factor, (hidden_ND, weight_VD))
    return of


@pytest.mark.parametrize("rows_per_chunk", [1, 7, 52, 53, 1000])
def test_loss_and_gradients_are_those_of_the_plain_operators(rows_per_chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", rows_per_chunk * COLUMNS)
    hidden_ND, weight_VD, labels_N = factors()
    exact = hidden_ND.detach().double().requires_grad_(), weight_VD.detach().double().requires_grad_(), labels_N
    assert fused_loss(hidden_ND, weight_VD, labels_N).item() == pytest.approx(plain_loss(*exact).item(), rel=1e-6)
    found, expected = gradients(fused_loss)(hidden_ND, weight_VD, labels_N), gradients(plain_loss)(*exact)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-6, atol=1e-6 * theirs.abs().max().item())
    assert not found[1][VOCAB_SIZE:].any(), "padded rows must not move"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-6), (torch.float16, 2**-9)])
@pytest.mark.parametrize("factor", [1e-3, 100.0, 2.0**17])
def test_half_precision(dtype, tolerance, factor, monkeypatch):
    """Against fp32 from the same values. The logits are rounded to the dtype: of up to 20 by up to 2^-5 in bf16."""
    if dtype == torch.float16 and factor > 1e4:
        factor = 2.0**11  # the largest gradient, about 20, must still fit
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 10 * COLUMNS)
    hidden_ND, weight_VD, labels_N = factors(dtype)
    exact = hidden_ND.detach().float().requires_grad_(), weight_VD.detach().float().requires_grad_(), labels_N
    loss = fused_loss(hidden_ND, weight_VD, labels_N)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain_loss(*exact).item(), rel=2**-9)
    found = gradients(fused_loss, factor)(hidden_ND, weight_VD, labels_N)
    for ours, theirs in zip(found, gradients(plain_loss, factor)(*exact), strict=True):
        assert ours.dtype == dtype
        assert (ours.float() - theirs).norm() < tolerance * theirs.norm()


def test_fp16_keeps_small_probabilities():
    """exp(-17.45) = 2.6e-8 is 0 in fp16, whose smallest number is 6e-8; 64 rows of it and a factor of 1024 are not."""
    hidden_ND = torch.ones(64, 16, dtype=torch.float16, requires_grad=True)
    weight_VD = torch.zeros(1000, 16, dtype=torch.float16)
    weight_VD[0] = 17.45 / 16
    weight_VD.requires_grad_()
    nll_sum = linear_cross_entropy(hidden_ND, weight_VD, torch.zeros(64, dtype=torch.int64), 1000, Axis())
    (nll_sum * 1024).backward()
    expected = 1024 * 64 * torch.exp(-(hidden_ND[0] * weight_VD[0]).float().sum())
    torch.testing.assert_close(weight_VD.grad[1:].float(), expected.expand(999, 16), rtol=0.03, atol=0)


def test_the_factor_of_the_backward_pass_is_not_rounded():
    """1 + 1.5 x 2^-8 would be 1 + 2^-7 in bf16, and every gradient too large by 0.2 %."""
    inputs, factor = factors(torch.bfloat16), 1 + 1.5 * 2**-8
    for once, scaled in zip(*(gradients(fused_loss, each)(*inputs) for each in (1.0, factor)), strict=True):
        assert (scaled.float().norm() / once.float().norm()).item() == pytest.approx(factor, abs=4e-4)


def test_no_gradients_without_need():
    hidden_ND, weight_VD, labels_N = factors()
    with torch.no_grad():
        loss = fused_loss(hidden_ND, weight_VD, labels_N)
    assert loss.grad_fn is None
    assert loss.item() == pytest.approx(plain_loss(hidden_ND, weight_VD, labels_N).item(), rel=1e-6)


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any operator's result has."""

    def __init__(self):
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.num_elements = max(self.num_elements, result.numel())
        return result


def test_no_tensor_has_all_logits(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 30 * COLUMNS)
    hidden_ND, weight_VD, labels_N = factors()
    with LargestTensor() as largest:
        fused_loss(hidden_ND, weight_VD, labels_N).backward()
    assert largest.num_elements == 30 * COLUMNS


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", [0, 1])
def test_what_is_not_finite_shows_in_loss_and_gradients(bad, part):
    inputs = factors()
    with torch.no_grad():
        inputs[part][3, 2] = bad
    loss = fused_loss(*inputs)
    assert not loss.isfinite()
    (loss * (1.0 + 0.0 * loss.detach())).backward()
    assert not any(each.grad.isfinite().all() for each in inputs[:2])


@pytest.mark.parametrize("label", [-5, -101, VOCAB_SIZE, COLUMNS])
def test_a_label_outside_the_vocabulary_is_an_error(label):
    hidden_ND, weight_VD, labels_N = factors()
    labels_N[4] = label
    with pytest.raises(RuntimeError, match="neither -100 nor one of 61 token ids"):
        fused_loss(hidden_ND, weight_VD, labels_N)


def test_no_label_at_all_is_zero_not_nan():
    hidden_ND, weight_VD, labels_N = factors()
    loss = fused_loss(hidden_ND, weight_VD, torch.full_like(labels_N, -100))
    loss.backward()
    assert loss.item() == 0.0
    assert not hidden_ND.grad.any()
    assert not weight_VD.grad.any()


def test_autocast_computes_in_its_dtype():
    hidden_ND, weight_VD, labels_N = factors()
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(fused_loss)(hidden_ND, weight_VD, labels_N)
    expected = gradients(fused_loss)(hidden_ND.bfloat16(), weight_VD.bfloat16(), labels_N)
    assert all(torch.equal(ours, theirs.float()) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_padding_never_changes_a_step(family):
    """Caught by a mutation that leaves the padded logits at 0: loss, gradients and padded rows all differ."""
    tokens_BT = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    results = {}
    for multiple in (1, 64):
        model = build_model(ModelConfig(family=family, vocab_multiple=multiple, **SHAPE), seed=1)
        with torch.no_grad():  # the draw of a table depends on its size: begin from the same rows
            for parameter in model.parameters():
                if parameter.shape[0] in (50, 64) and parameter.dim() == 2:
                    parameter[:50] = torch.randn(50, 32, generator=torch.Generator().manual_seed(2)) * 0.02
        # This eps keeps biases of keys still: softmax makes their gradient 0, and Adam would step by its rounding.
        config = OptimizerConfig(learning_rate=0.01, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-4)
        facts = {name: ParameterFacts(decays=True) for name, _ in model.named_parameters()}
        groups = parameter_groups(model.named_parameters(), facts, config)
        optimizer = build_optimizer(groups, config, split_parts=lambda name, tensor: [tensor], is_fp32=True)
        for _ in range(3):
            nll_sum = model(tokens_BT[:, :-1], labels_BT=tokens_BT[:, 1:])
            optimizer.zero_grad()
            (nll_sum / 16).backward()
            optimizer.step()
        results[multiple] = (nll_sum.item(), model)
    assert results[64][0] == pytest.approx(results[1][0], rel=1e-6)
    for name, parameter in results[64][1].named_parameters():
        exact = results[1][1].get_parameter(name)
        if parameter.shape != exact.shape:
            assert not parameter[50:].any()
            assert not parameter.grad[50:].any()
        torch.testing.assert_close(parameter[: len(exact)], exact, rtol=0, atol=2e-5)
