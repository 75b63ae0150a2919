"""Linear layers: whole, cut by output features (column) or by input features (row).

Shapes: B rows, T positions, t = T / tp positions of a sequence shard.
Source: Shoeybi et al. 2019 (Megatron-LM), section 3; sequence shards: Korthikanti et al. 2022, section 4.2.2.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from megascale.model.axes import Axes
from megascale.model.fp8 import fp8_linear
from megascale.parallel.axis import ALONE, Axis
from megascale.parallel.collectives import (
    copy_to,
    gather,
    reduce_from,
    reduce_scatter,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from megascale.parallel.deferred import WeightGradients

SEQUENCE_DIM = 1


class Linear(nn.Module):
    """y = x W^T + b, on uninitialised memory, with one or more dims of output features.

    Several output dims make a stacked weight, such as gate and up projections as (2, d_ff, d_model): one matrix product
    computes both, and a cut along d_ff keeps the pairs together. The memory is left as it is: parameters are
    initialised by name, and drawing them twice would double the start-up time of a large model.

    Attributes:
        deferred: where weight gradients wait for their turn in a zero-bubble pipeline; None computes them at once.
        is_fp8: whether the products are computed in fp8.

    Shape: (B, T, in_features) to (B, T, product of out_features).
    """

    def __init__(self, in_features: int, *out_features: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*out_features, in_features))
        self.bias = nn.Parameter(torch.empty(*out_features)) if bias else None
        self.deferred: WeightGradients | None = None
        self.is_fp8 = False

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.product(inputs, self.flat_bias(), ALONE, is_gathered=False)

    def flat_bias(self) -> torch.Tensor | None:
        """The bias as a vector."""
        return None if self.bias is None else self.bias.flatten()

    def product(
        self, inputs: torch.Tensor, bias: torch.Tensor | None, axis: Axis, is_gathered: bool
    ) -> torch.Tensor:
        """x W^T + b for inputs that the ranks of `axis` all use: as they are, or gathered along the sequence."""
        if self.is_fp8:
            shared = gather(inputs, axis, SEQUENCE_DIM) if is_gathered else copy_to(inputs, axis)
            return fp8_linear(shared, self.weight, bias)
        if axis.size == 1 and self.deferred is None and self.weight.dim() == 2:
            return F.linear(inputs, self.weight, bias)
        return OverlappedLinear.apply(inputs, self.weight, bias, axis, is_gathered, self.deferred)


class ColumnLinear(Linear):
    """A linear layer whose output features are cut over tp: each rank has a part of the last dim of `out_features`.

    Shape: (B, T, in_features), or (B, t, in_features) when sequence parallel, to (B, T, out_features / tp).
    Cost: forward nothing, or one all-gather of the inputs when sequence parallel; backward one all-reduce of their
        gradient, or a reduce-scatter of it and an all-gather of the inputs again. Joined (see `Axes`): nothing.
    """

    def __init__(self, in_features: int, *out_features: int, bias: bool, axes: Axes):
        super().__init__(in_features, *out_features[:-1], out_features[-1] // axes.tp.size, bias=bias)
        self.tp = ALONE if axes.is_joined else axes.tp
        self.is_sequence_parallel = axes.is_sequence_parallel and not axes.is_joined

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.product(inputs, self.flat_bias(), self.tp, self.is_sequence_parallel)


class RowLinear(Linear):
    """A linear layer whose input features are cut over tp: each rank's product is a part of the sum.

    The bias is whole on every rank and added once, after the sum.

    Shape: (B, T, in_features / tp) to (B, T, out_features), or (B, t, out_features) when sequence parallel.
    Cost: forward one all-reduce of the outputs, or a reduce-scatter when sequence parallel; backward nothing, or one
        all-gather of the gradient. Joined (see `Axes`): nothing, and the output is this rank's part of the sum; such a
        layer has no bias.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, axes: Axes):
        super().__init__(in_features // axes.tp.size, out_features, bias=bias)
        self.tp, self.is_sequence_parallel = ALONE if axes.is_joined else axes.tp, axes.is_sequence_parallel

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.tp.size == 1:
            return self.product(inputs, self.bias, ALONE, is_gathered=False)
        part = self.product(inputs, None, ALONE, is_gathered=False)
        total = reduce_scatter(part, self.tp, SEQUENCE_DIM) if self.is_sequence_parallel else reduce_from(part, self.tp)
        return total if self.bias is None else total + self.bias


def use_fp8(model: nn.Module) -> None:
    """Makes every linear layer of the model compute its products in fp8."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.is_fp8 = True


class OverlappedLinear(torch.autograd.Function):
    """x W^T + b; in the backward pass the inputs' gradient travels while the weight's is computed.

    Of inputs that are gathered only this rank's shard is kept; the backward pass gathers them again, meanwhile it
    computes the inputs' gradient. The weight is kept as the parameter itself, never as a view: under ZeRO-3 a view
    would hold on to memory that the engine gives back between uses.
    """

    @staticmethod
    def forward(ctx, inputs, weight, bias, axis: Axis, is_gathered: bool, deferred: WeightGradients | None):
        ctx.save_for_backward(inputs, weight)
        ctx.axis, ctx.is_gathered, ctx.has_bias = axis, is_gathered, bias is not None
        # The parameter itself: what a recomputed block saves and gives back is only an alias of it.
        ctx.put_off = None if deferred is None else partial(deferred.add, weight)
        whole = start_all_gather(inputs, axis, SEQUENCE_DIM)() if is_gathered else inputs
        return F.linear(whole, weight.flatten(0, -2), bias)

    @staticmethod
    def backward(ctx, grad):
        inputs, weight = ctx.saved_tensors
        axis, is_gathered = ctx.axis, ctx.is_gathered
        whole = start_all_gather(inputs, axis, SEQUENCE_DIM) if is_gathered else lambda: inputs
        grad_whole = grad @ weight.flatten(0, -2)
        grad_inputs = (
            start_reduce_scatter(grad_whole, axis, SEQUENCE_DIM) if is_gathered else start_all_reduce(grad_whole, axis)
        )
        compute_weight_gradient = partial(weight_gradient, whole().detach(), grad.detach(), weight.shape)
        grad_weight = compute_weight_gradient() if ctx.put_off is None else ctx.put_off(compute_weight_gradient)
        grad_bias = grad.flatten(0, -2).sum(dim=0) if ctx.has_bias else None
        return grad_inputs(), grad_weight, grad_bias, None, None, None


def weight_gradient(inputs: torch.Tensor, grad: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """g^T x over all rows and positions, in the weight's shape."""
    return (grad.flatten(0, -2).t() @ inputs.flatten(0, -2)).view(shape)
