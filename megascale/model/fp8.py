"""Linear layers whose products are computed in 8-bit floating point, on the GPUs that have it.

Numbers are scaled per tensor, by the largest magnitude found at the moment, into E4M3 (4 bits of exponent, 3 of
mantissa, up to 448) for inputs and weights and into E5M2 (5 and 2, up to 57344) for gradients. Parameters, their
gradients and all that is not a product of a linear layer stay as they are.

Shapes: N positions, I input features, O output features.
Source: Micikevicius et al. 2022, FP8 Formats for Deep Learning, sections 3 and 4.
"""

import torch

from megascale.errors import LaunchError

FORWARD_DTYPE, GRADIENT_DTYPE = torch.float8_e4m3fn, torch.float8_e5m2
MIN_CAPABILITY = (9, 0)
"""Hopper. The first GPUs with these products; see NVIDIA's table of compute capabilities."""
ALIGNMENT = 16
"""The sizes that a product sums over or writes to must be multiples of it: 16 bytes, what tensor cores load at once."""
MIN_MAGNITUDE = 1e-12
"""A tensor of zeros is scaled as if this were its largest magnitude."""


def check_fp8(device: torch.device) -> None:
    """Refuses a device that can't compute in fp8.

    Raises:
        LaunchError: it is not a GPU of compute capability 9.0 (Hopper) or newer.
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= MIN_CAPABILITY:
            return
        found = f"{torch.cuda.get_device_name(device)}, of compute capability {capability[0]}.{capability[1]}"
    else:
        found = f"the device {device.type}"
    raise LaunchError(
        f"precision.fp8_linear: true needs GPUs of compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} (Hopper) "
        f"or newer, whose tensor cores multiply 8-bit numbers; found {found}. Set precision.fp8_linear: false."
    )


def fp8_linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b with all three products (forward, inputs' gradient, weight's gradient) in fp8.

    A product with a size that is no multiple of 16 is computed in bf16.

    Args:
        weight: may have several dims of output features, which the result has as one.

    Shape: (..., I) and (*O, I) to (..., product of O), in the inputs' dtype.
    Cost: 6 N I O FLOPs, at up to twice bf16's rate; keeps N I bytes of inputs for backward, half of what bf16 keeps.
        Each of the five conversions reads its tensor twice.
    """
    return Fp8Linear.apply(inputs, weight, bias)


class Fp8Linear(torch.autograd.Function):
    """See `fp8_linear`. Inputs are kept in fp8, the weight as it is: ZeRO-3 gives its memory back between uses."""

    @staticmethod
    def forward(ctx, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        inputs_NI, scale = quantize(inputs.flatten(0, -2), FORWARD_DTYPE)
        weight_OI, weight_scale = quantize(weight.flatten(0, -2), FORWARD_DTYPE)
        ctx.save_for_backward(inputs_NI, scale, weight)
        ctx.has_bias, ctx.dtype = bias is not None, inputs.dtype
        output_NO = product(inputs_NI, weight_OI.t(), scale, weight_scale, is_fast=True).to(inputs.dtype)
        if bias is not None:
            output_NO += bias
        return output_NO.view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        inputs_NI, scale, weight = ctx.saved_tensors
        weight_OI, weight_scale = quantize(weight.flatten(0, -2), FORWARD_DTYPE)
        grad_NO, grad_scale = quantize(grad.flatten(0, -2), GRADIENT_DTYPE)
        grad_inputs = product(grad_NO, weight_OI, grad_scale, weight_scale, is_fast=False).to(ctx.dtype)
        grad_weight = product(grad_NO.t(), inputs_NI, grad_scale, scale, is_fast=False).to(weight.dtype)
        grad_bias = grad.flatten(0, -2).sum(dim=0) if ctx.has_bias else None
        return grad_inputs.view(*grad.shape[:-1], -1), grad_weight.view(weight.shape), grad_bias


def quantize(tensor: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensor in fp8, and the fp32 scalar to multiply it by; a number that isn't finite makes the scalar so too."""
    largest = torch.finfo(dtype).max
    scale = tensor.abs().amax().float().clamp(min=MIN_MAGNITUDE) / largest
    return (tensor.float() / scale).to(dtype), scale


def product(
    left: torch.Tensor, right: torch.Tensor, left_scale: torch.Tensor, right_scale: torch.Tensor, is_fast: bool
) -> torch.Tensor:
    """The product of two fp8 matrices in bf16.

    Args:
        is_fast: whether tensor cores may add up with fewer bits, which is enough forward but not for gradients.
    """
    if any(size % ALIGNMENT for size in (*left.shape, *right.shape)):
        left, right = left.bfloat16() * left_scale.bfloat16(), right.bfloat16() * right_scale.bfloat16()
        return left @ right
    # The kernel takes rows of the left and columns of the right one after the other in memory.
    left, right = left.contiguous(), right.t().contiguous().t()
    return torch._scaled_mm(
        left, right, scale_a=left_scale, scale_b=right_scale, out_dtype=torch.bfloat16, use_fast_accum=is_fast
    )
