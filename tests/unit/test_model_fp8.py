"""fp8 linear layers: each product within the formats' rounding, and a clear refusal where there is no such hardware.

Mutations seen to be caught: the scale of the weight left out; the gradient's scale used for the inputs in the weight's
gradient; gradients scaled into E4M3's range (448); a tensor of zeros divided by 0.
"""

import pytest
import torch

from megascale.errors import LaunchError
from megascale.model.fp8 import FORWARD_DTYPE, GRADIENT_DTYPE, check_fp8, fp8_linear, quantize

FORWARD_ROUNDING, GRADIENT_ROUNDING = 2**-4, 2**-3
"""Largest relative error of a number with 3 and with 2 bits of mantissa."""
OUTPUT_ROUNDING = 2**-8
"""The same for bf16, in which products come out."""


def inputs(num_rows, in_features, out_features, seed=1):
    """(inputs, weight with two output dims, bias, gradient), of magnitudes that only scaling brings into range."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, num_rows // 2, in_features), (2, out_features // 2, in_features), (out_features,))
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    values = [(value * size).requires_grad_() for value, size in zip(values, (3e3, 1e-5, 1e-2), strict=True)]
    return *values, torch.randn(2, num_rows // 2, out_features, generator=generator) * 1e-7


def bound(left, right, left_rounding, right_rounding):
    """What each element of a product may be off by: relative rounding of both factors and of the result, and the
    smallest numbers of E4M3 and E5M2, which are under 2^-17 of the largest."""
    left, right = (each.abs() + each.abs().max() * 2**-17 for each in (left, right))
    relative = (1 + left_rounding) * (1 + right_rounding) * (1 + OUTPUT_ROUNDING) - 1
    return relative * (left @ right)


@pytest.mark.parametrize(
    ("num_rows", "in_features", "out_features"), [(64, 32, 48), (30, 32, 48), (64, 33, 48), (64, 32, 40)],
    ids=["all in fp8", "odd rows", "odd inputs", "odd outputs"],
)
def test_every_product_is_within_the_rounding_of_its_format(num_rows, in_features, out_features):
    x_BTI, weight, bias_O, grad_BTO = inputs(num_rows, in_features, out_features)
    result = fp8_linear(x_BTI, weight, bias_O)
    result.backward(grad_BTO)
    assert result.shape == grad_BTO.shape
    assert result.dtype == torch.float32
    with torch.no_grad():
        x_NI, weight_OI, grad_NO = x_BTI.flatten(0, 1), weight.flatten(0, 1), grad_BTO.flatten(0, 1)
        cases = [
            (result.flatten(0, 1) - bias_O, x_NI, weight_OI.t(), FORWARD_ROUNDING, FORWARD_ROUNDING),
            (x_BTI.grad.flatten(0, 1), grad_NO, weight_OI, GRADIENT_ROUNDING, FORWARD_ROUNDING),
            (weight.grad.flatten(0, 1), grad_NO.t(), x_NI, GRADIENT_ROUNDING, FORWARD_ROUNDING),
        ]
        for found, left, right, *roundings in cases:
            error = (found - left @ right).abs()
            assert (error <= bound(left, right, *roundings)).all()
            assert 0 < error.norm() < 0.08 * (left @ right).norm(), "errors of both signs cancel in a sum"
        torch.testing.assert_close(bias_O.grad, grad_NO.sum(dim=0))


def test_bf16_in_bf16_out():
    x_BTI, weight, _, _ = inputs(32, 32, 32)
    result = fp8_linear(x_BTI.bfloat16(), weight.bfloat16(), None)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), fp8_linear(x_BTI, weight, None), rtol=0.1, atol=2e-2)


def test_only_bytes_are_kept_of_the_inputs():
    x_BTI, weight, _, _ = inputs(32, 32, 32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        fp8_linear(x_BTI, weight, None)
    assert sorted(tensor.nbytes for tensor in kept if tensor.dtype != weight.dtype or tensor.numel() > 1) == [
        x_BTI.numel(), weight.nbytes
    ]


@pytest.mark.parametrize("dtype", [FORWARD_DTYPE, GRADIENT_DTYPE], ids=str)
def test_quantize_uses_the_whole_range_and_keeps_zeros(dtype):
    values, scale = quantize(torch.tensor([1e-3, -2e-3, 0.0]), dtype)
    assert values.float().abs().max() == torch.finfo(dtype).max
    assert (values.float() * scale)[:2].tolist() == pytest.approx([1e-3, -2e-3], rel=2**-3)
    zeros, scale = quantize(torch.zeros(3), dtype)
    assert not zeros.float().any()
    assert scale.isfinite()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("num_rows", [32, 30])
def test_what_is_not_finite_stays_so(bad, num_rows):
    x_BTI, weight, _, grad_BTO = inputs(num_rows, 32, 32)
    with torch.no_grad():
        x_BTI[0, 1, 2] = bad
    result = fp8_linear(x_BTI, weight, None)
    assert not result.isfinite().all()
    result.backward(grad_BTO)
    assert not weight.grad.isfinite().all()


def test_refused_without_the_hardware(monkeypatch):
    with pytest.raises(LaunchError, match=r"9.0 \(Hopper\) or newer.*found the device cpu. Set .*fp8_linear: false"):
        check_fp8(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(LaunchError, match=r"found NVIDIA A100, of compute capability 8.0"):
        check_fp8(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    check_fp8(torch.device("cuda"))
