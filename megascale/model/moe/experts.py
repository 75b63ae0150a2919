"""The experts of a layer as stacked weights, over tokens sorted by expert.

Shapes: M tokens sorted by expert, e experts of this rank, D d_model, F d_ff of an expert, f = F / tp.
"""

from functools import partial

import torch
from torch import nn

from megascale.config.model import ModelConfig
from megascale.model.axes import Axes
from megascale.model.feed_forward import ACTIVATIONS
from megascale.parallel.deferred import WeightGradients

GROUPED_CAPABILITY = (9, 0)
"""Of the first NVIDIA GPUs with a grouped product in torch (Hopper)."""


class GroupedLinear(nn.Module):
    """A linear layer of each expert, without biases; each token goes through its own expert's.

    Attributes:
        deferred: as in `megascale.model.linear.Linear`.

    Shape: (M, in_features) and (e) int64 counts to (M, product of out_features).
    """

    def __init__(self, num_experts: int, in_features: int, *out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, *out_features, in_features))
        self.deferred: WeightGradients | None = None

    def forward(self, inputs: torch.Tensor, counts_e: torch.Tensor) -> torch.Tensor:
        return GroupedProduct.apply(inputs, self.weight, counts_e, self.deferred)


class Experts(nn.Module):
    """This rank's experts: of each of its e = E / ep experts the features that its tp rank has.

    Shape: (M, D) sorted by expert, and (e) int64 tokens of each, to (M, D): a part of the sum over tp.
    """

    def __init__(self, config: ModelConfig, axes: Axes):
        super().__init__()
        num_own, d_own = config.moe.num_experts // axes.ep.size, config.expert_dim // axes.tp.size
        self.activation = ACTIVATIONS[config.feed_forward]
        self.is_gated = config.is_gated
        if config.is_gated:
            self.gate_up = GroupedLinear(num_own, config.d_model, 2, d_own)
        else:
            self.up = GroupedLinear(num_own, config.d_model, d_own)
        self.output = GroupedLinear(num_own, d_own, config.d_model)

    def forward(self, tokens_MD: torch.Tensor, counts_e: torch.Tensor) -> torch.Tensor:
        if self.is_gated:
            gate_Mf, up_Mf = self.gate_up(tokens_MD, counts_e).chunk(2, dim=-1)
            inner_Mf = self.activation(gate_Mf) * up_Mf
        else:
            inner_Mf = self.activation(self.up(tokens_MD, counts_e))
        return self.output(inner_Mf, counts_e)


class GroupedProduct(torch.autograd.Function):
    """x W^T with the weight of each token's expert. The weight is kept as the parameter itself, as in linear.py."""

    @staticmethod
    def forward(ctx, inputs, weight, counts_e, deferred: WeightGradients | None):
        ctx.save_for_backward(inputs, weight, counts_e)
        ctx.put_off = None if deferred is None else partial(deferred.add, weight)
        return grouped_product(inputs, weight.flatten(1, -2).transpose(1, 2), counts_e)

    @staticmethod
    def backward(ctx, grad):
        inputs, weight, counts_e = ctx.saved_tensors
        grad = grad.contiguous()
        grad_inputs = grouped_product(grad, weight.flatten(1, -2), counts_e)
        compute = partial(grouped_outer, grad.detach(), inputs.detach(), counts_e, weight.shape)
        return grad_inputs, compute() if ctx.put_off is None else ctx.put_off(compute), None, None


def grouped_product(inputs: torch.Tensor, matrices: torch.Tensor, counts_e: torch.Tensor) -> torch.Tensor:
    """Each token times the matrix of its expert.

    Shape: (M, I), (e, I, O) and (e) to (M, O).
    """
    if has_grouped_kernel(inputs, matrices.shape[-1]):
        return torch._grouped_mm(inputs, matrices, offs=counts_e.cumsum(0, dtype=torch.int32))
    parts = inputs.split(counts_e.tolist())
    return torch.cat([part @ matrix for part, matrix in zip(parts, matrices, strict=True)])


def grouped_outer(
    grad: torch.Tensor, inputs: torch.Tensor, counts_e: torch.Tensor, shape: torch.Size
) -> torch.Tensor:
    """g^T x over the tokens of each expert, in the shape of the stacked weight.

    Shape: (M, O), (M, I) and (e) to `shape`, which flattens to (e, O, I).
    """
    if has_grouped_kernel(inputs, grad.shape[-1]):
        return torch._grouped_mm(grad.t(), inputs, offs=counts_e.cumsum(0, dtype=torch.int32)).view(shape)
    counts = counts_e.tolist()
    pairs = zip(grad.split(counts), inputs.split(counts), strict=True)
    return torch.stack([grad_part.t() @ part for grad_part, part in pairs]).view(shape)


def has_grouped_kernel(tensor: torch.Tensor, num_others: int) -> bool:
    """Whether one kernel computes the products of all experts; elsewhere they run one after the other, and the sizes
    come to the CPU first.

    Args:
        num_others: features on the other side of the weight. The kernel wants rows of both in steps of 16 bytes.
    """
    return (
        tensor.is_cuda and tensor.dtype == torch.bfloat16 and tensor.shape[-1] % 8 == num_others % 8 == 0
        and torch.cuda.get_device_capability(tensor.device) >= GROUPED_CAPABILITY
    )
