"""Collectives over an explicit axis: started ones to overlap with work, and pairs that autograd turns around.

An axis of one rank returns its input at once, so that a laptop runs the same lines as a cluster. The operators are
those that torch.compile traces (`_c10d_functional`): plain tensors in and out, in eager mode already on their way when
the call returns. What is sent is cut off from autograd: gloo's threads take it apart with gradients enabled, and would
build nodes of the graph while this thread does. It is held until the result is waited for, so that none of them drops
the last reference to a Python object.

Bytes sent by each of n ranks for x bytes of the larger side (ring algorithms): all-reduce 2 x (n-1)/n, all-gather,
reduce-scatter and all-to-all x (n-1)/n.
Source of the pairs: Shoeybi et al. 2019 (Megatron-LM), section 3; Korthikanti et al. 2022, section 4.2.2.
"""

from collections.abc import Callable

import torch

from megascale.parallel.axis import Axis

Started = Callable[[], torch.Tensor]
"""Waits for a collective and returns its result."""

ops = torch.ops._c10d_functional


def start_all_reduce(tensor: torch.Tensor, axis: Axis, op: str = "sum") -> Started:
    """Starts to combine a tensor over the axis; the input stays as it is."""
    if axis.size == 1:
        return lambda: tensor
    pending = ops.all_reduce(tensor.detach().contiguous(), op, axis.name)
    return lambda: ops.wait_tensor(pending)


def start_all_gather(tensor: torch.Tensor, axis: Axis, dim: int) -> Started:
    """Starts to lay the ranks' tensors side by side along `dim`, in rank order."""
    if axis.size == 1:
        return lambda: tensor
    sent, dim = tensor.detach().contiguous(), dim % tensor.dim()
    pending = ops.all_gather_into_tensor(sent, axis.size, axis.name)

    def finish() -> torch.Tensor:
        parts = ops.wait_tensor(pending).view(axis.size, *sent.shape)
        return parts.movedim(0, dim).flatten(dim, dim + 1)

    return finish


def start_reduce_scatter(tensor: torch.Tensor, axis: Axis, dim: int) -> Started:
    """Starts to sum a tensor over the axis; each rank gets its part along `dim`."""
    if axis.size == 1:
        return lambda: tensor
    dim = dim % tensor.dim()
    parts = tensor.detach().unflatten(dim, (axis.size, -1)).movedim(dim, 0).contiguous()
    if not axis.is_gloo:
        pending = ops.reduce_scatter_tensor(parts, "sum", axis.size, axis.name)
        return lambda: ops.wait_tensor(pending).squeeze(0)
    finish = exchange_parts(parts, axis)
    return lambda: finish().sum(dim=0)


def start_all_to_all(tensor: torch.Tensor, axis: Axis, split_dim: int, join_dim: int) -> Started:
    """Starts to send part i along `split_dim` to rank i; the received parts lie side by side along `join_dim`."""
    if axis.size == 1:
        return lambda: tensor
    split_dim, join_dim = split_dim % tensor.dim(), join_dim % tensor.dim()
    sent = tensor.detach().unflatten(split_dim, (axis.size, -1)).movedim(split_dim, 0).contiguous()
    finish = exchange_parts(sent, axis)
    return lambda: finish().movedim(0, join_dim).flatten(join_dim, join_dim + 1)


def exchange_parts(parts: torch.Tensor, axis: Axis) -> Started:
    """Starts an all-to-all of a tensor stacked by destination; the result is stacked by origin."""
    counts = [1] * axis.size
    pending = ops.all_to_all_single(parts, counts, counts, axis.name)
    return lambda: ops.wait_tensor(pending).view_as(parts)


class CopyTo(torch.autograd.Function):
    """The input as it is; its gradient is summed over the axis. Goes before work that the axis shares out."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return start_all_reduce(grad, ctx.axis)(), None


class ReduceFrom(torch.autograd.Function):
    """The sum over the axis; its gradient is everyone's. Goes after work that the axis shares out."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
        return start_all_reduce(tensor, axis)()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class Gather(torch.autograd.Function):
    """The ranks' tensors side by side along a dim; the gradient is summed and cut up again."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, axis: Axis, dim: int) -> torch.Tensor:
        ctx.axis, ctx.dim = axis, dim
        return start_all_gather(tensor, axis, dim)()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return start_reduce_scatter(grad, ctx.axis, ctx.dim)(), None, None


class ReduceScatter(torch.autograd.Function):
    """This rank's part along a dim of the sum over the axis; the gradient is gathered."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, axis: Axis, dim: int) -> torch.Tensor:
        ctx.axis, ctx.dim = axis, dim
        return start_reduce_scatter(tensor, axis, dim)()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return start_all_gather(grad, ctx.axis, ctx.dim)(), None, None


class AllToAll(torch.autograd.Function):
    """Cuts along one dim and joins along another, such as heads for positions; the gradient goes the other way."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, axis: Axis, split_dim: int, join_dim: int) -> torch.Tensor:
        ctx.axis, ctx.split_dim, ctx.join_dim = axis, split_dim, join_dim
        return start_all_to_all(tensor, axis, split_dim, join_dim)()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return start_all_to_all(grad, ctx.axis, ctx.join_dim, ctx.split_dim)(), None, None, None


class AllToAllRows(torch.autograd.Function):
    """Rows of a matrix, so many to and from each rank; the gradients of those received go back."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, num_sent: list[int], num_received: list[int], axis: Axis) -> torch.Tensor:
        ctx.num_sent, ctx.num_received, ctx.axis = num_sent, num_received, axis
        return exchange_rows(tensor, num_sent, num_received, axis)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return exchange_rows(grad, ctx.num_received, ctx.num_sent, ctx.axis), None, None, None


def exchange_rows(tensor: torch.Tensor, num_sent: list[int], num_received: list[int], axis: Axis) -> torch.Tensor:
    """Sends the first `num_sent[0]` rows to rank 0 and so on; the received rows lie in the order of their origins."""
    return ops.wait_tensor(ops.all_to_all_single(tensor.detach().contiguous(), num_received, num_sent, axis.name))


def copy_to(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """`CopyTo`, without a node in the graph where nothing is shared."""
    return tensor if axis.size == 1 else CopyTo.apply(tensor, axis)


def reduce_from(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """`ReduceFrom`, likewise."""
    return tensor if axis.size == 1 else ReduceFrom.apply(tensor, axis)


def gather(tensor: torch.Tensor, axis: Axis, dim: int) -> torch.Tensor:
    """`Gather`, likewise."""
    return tensor if axis.size == 1 else Gather.apply(tensor, axis, dim)


def reduce_scatter(tensor: torch.Tensor, axis: Axis, dim: int) -> torch.Tensor:
    """`ReduceScatter`, likewise."""
    return tensor if axis.size == 1 else ReduceScatter.apply(tensor, axis, dim)


def all_to_all(tensor: torch.Tensor, axis: Axis, split_dim: int, join_dim: int) -> torch.Tensor:
    """`AllToAll`, likewise."""
    return tensor if axis.size == 1 else AllToAll.apply(tensor, axis, split_dim, join_dim)


def all_to_all_rows(tensor: torch.Tensor, num_sent: list[int], num_received: list[int], axis: Axis) -> torch.Tensor:
    """`AllToAllRows`, likewise."""
    return tensor if axis.size == 1 else AllToAllRows.apply(tensor, num_sent, num_received, axis)
