"""Tokens to the ranks of their experts and back.

Expert i is on ep rank i // (E / ep). Rows travel twice forward (to the experts and back) and twice backward, each time
only those whose expert another rank has: over all ranks about N K D (ep - 1) / ep elements a time for N tokens, besides
E counts a rank.

Shapes: N tokens of this rank, K experts of a token, M pairs of a token and an expert, D d_model, E experts, e of one
rank, R ep ranks.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from megascale.parallel.axis import Axis
from megascale.parallel.collectives import all_to_all_rows, exchange_parts

RunExperts = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(tokens_MD sorted by expert, counts_e) -> outputs (M, D)."""


def route(
    run_experts: RunExperts, tokens_ND: torch.Tensor, experts_NK: torch.Tensor, gates_NK: torch.Tensor,
    num_experts: int, ep: Axis, *, may_drop: bool,
) -> torch.Tensor:
    """The gated sum of each token's experts.

    Args:
        experts_NK: int64; `num_experts` for a pair that is dropped: it adds nothing.
        may_drop: whether there may be such pairs. Without them nothing waits for the device here.

    Shape: (N, D) to (N, D).
    """
    num_pairs, top_k = experts_NK.numel(), experts_NK.shape[1]
    pairs_M = experts_NK.flatten()
    order_M = pairs_M.argsort(stable=True)  # by expert, within it by place: the dropped are last
    counts_E = count_experts(pairs_M, num_experts + 1)[:-1]
    num_kept = int(counts_E.sum()) if may_drop else num_pairs
    sorted_MD = tokens_ND[order_M[:num_kept] // top_k]
    if ep.size == 1:
        output_MD = run_experts(sorted_MD, counts_E)
    else:
        output_MD = run_elsewhere(run_experts, sorted_MD, counts_E, ep)
    output_MD = F.pad(output_MD, (0, 0, 0, num_pairs - num_kept))
    output_NKD = output_MD[invert(order_M)].unflatten(0, (-1, top_k))
    return (output_NKD * gates_NK[..., None].to(output_NKD.dtype)).sum(dim=1)


def run_elsewhere(
    run_experts: RunExperts, tokens_MD: torch.Tensor, counts_E: torch.Tensor, ep: Axis
) -> torch.Tensor:
    """Lets the ranks of the experts run them.

    Shape: (M, D) sorted by expert, to (M, D) in the same order.
    Cost: see the top of the file; waits for the counts to reach the CPU, since they size the messages.
    """
    counts_Re = counts_E.view(ep.size, -1)
    received_Re = exchange_parts(counts_Re, ep)()
    num_sent, num_received = counts_Re.sum(dim=1).tolist(), received_Re.sum(dim=1).tolist()
    arrived_MD = all_to_all_rows(tokens_MD, num_sent, num_received, ep)
    # They come sorted by origin, and by expert within it.
    own_experts_e = torch.arange(received_Re.shape[1], device=counts_E.device)
    experts_M = own_experts_e.repeat(ep.size).repeat_interleave(received_Re.flatten(), output_size=sum(num_received))
    order_M = experts_M.argsort(stable=True)
    output_MD = run_experts(arrived_MD[order_M], received_Re.sum(dim=0))
    return all_to_all_rows(output_MD[invert(order_M)], num_received, num_sent, ep)


def count_experts(experts_M: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How often each expert is there; unlike `bincount` without a wait for the device.

    Shape: (M) int64 to (num_experts) int64.
    """
    counts_E = experts_M.new_zeros(num_experts)
    return counts_E.scatter_add_(0, experts_M, torch.ones_like(experts_M))


def invert(order_M: torch.Tensor) -> torch.Tensor:
    """The permutation that undoes one."""
    inverse_M = torch.empty_like(order_M)
    inverse_M[order_M] = torch.arange(len(order_M), device=order_M.device)
    return inverse_M
