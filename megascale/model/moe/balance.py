"""What keeps experts equally used: losses beside the main one, a moving bias, and a limit on what an expert takes.

All is worked out row by row, over the whole row: f_e is the number of the row's tokens that chose expert e (before any
is dropped) over its length T, P_e the mean of its shares, lse the log of the sum of the exponentials of the logits:

    balance_r = E / K  sum_e f_e P_e          1 where experts are used equally (Fedus et al. 2021, equations 4 to 6;
                                              transformers' load_balancing_loss_func is K times it)
    z_r       = mean_t lse_t^2                (Zoph et al. 2022, equation 5)

A step minimises  1 / n  sum_r (CE_r + n_r sum_l (balance_weight balance_rl + z_weight z_rl)),  where n_r are the labels
of row r, n those of the global batch, CE_r the row's sum of cross-entropies and l the sparse layers. The loss that is
reported is the first part. No micro-batch and no layout enters.

Shapes: B rows, T positions, E experts, K experts of a token; A positions of attention on this rank.
"""

import torch

from megascale.parallel.axis import Axis
from megascale.parallel.collectives import start_all_reduce


class Tally:
    """What a layer's routers did since the last look, on the device, over the micro-batches of this rank.

    It is filled in the backward pass, which each micro-batch has once: a recomputed forward pass counts nothing twice,
    and an evaluation nothing at all.

    Attributes:
        counts_E: int64, tokens that chose each expert; and last, pairs that were dropped.
        sums_2: fp32, the sums of n_r balance_r and n_r z_r over this rank's positions.
    """

    def __init__(self, num_experts: int):
        self.counts_E = torch.zeros(num_experts + 1, dtype=torch.int64)
        self.sums_2 = torch.zeros(2)

    def add(self, counts_E: torch.Tensor, sums_2: torch.Tensor) -> None:
        """Adds a micro-batch."""
        self.counts_E = self.counts_E.to(counts_E.device) + counts_E
        self.sums_2 = self.sums_2.to(sums_2.device) + sums_2

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both, and begins anew."""
        taken = self.counts_E, self.sums_2
        self.counts_E, self.sums_2 = torch.zeros_like(self.counts_E), torch.zeros_like(self.sums_2)
        return taken


class AddLoss(torch.autograd.Function):
    """The output as it is; in the backward pass the loss gets `factor` as its gradient, and the tally its counts.

    The loss so joins the gradient wherever this layer is, on any stage of a pipeline, and nothing has to carry it to
    the head.
    """

    @staticmethod
    def forward(ctx, output, loss, factor, counts_E, sums_2, tally: Tally):
        ctx.save_for_backward(factor, counts_E, sums_2)
        ctx.tally = tally
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad):
        factor, counts_E, sums_2 = ctx.saved_tensors
        ctx.tally.add(counts_E, sums_2)
        return grad, factor, None, None, None, None


def count_rows(experts_BAK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How many of these tokens of each row chose each expert.

    Shape: (B, A, K) int64 to (B, E) int64.
    """
    flat_BM = experts_BAK.flatten(1)
    return flat_BM.new_zeros(len(flat_BM), num_experts).scatter_add_(1, flat_BM, torch.ones_like(flat_BM))


def balance_of_rows(shares_BTE: torch.Tensor, counts_BE: torch.Tensor, num_positions: int, top_k: int) -> torch.Tensor:
    """This rank's part of each row's balance loss: linear in the shares, so the parts of all ranks add up.

    Args:
        num_positions: of the whole row.

    Shape: (B, T, E) fp32 of this rank's positions and (B, E) int64 of the whole row, to (B).
    """
    fractions_BE = counts_BE.to(shares_BTE.dtype) / num_positions
    shares_BE = shares_BTE.sum(dim=1) / num_positions
    return counts_BE.shape[1] / top_k * (fractions_BE * shares_BE).sum(dim=1)


def z_of_rows(logits_BTE: torch.Tensor, num_positions: int) -> torch.Tensor:
    """This rank's part of each row's z-loss.

    Shape: (B, T, E) fp32 to (B).
    """
    return logits_BTE.logsumexp(dim=-1).square().sum(dim=1) / num_positions


def limit_rows(
    experts_BAK: torch.Tensor, columns_A: torch.Tensor, num_experts: int, capacity_factor: float, cp: Axis
) -> torch.Tensor:
    """The choices with those that exceed an expert's capacity replaced by `num_experts`.

    An expert takes the first ceil(capacity_factor T K / E) tokens of each row that chose it, in the order of their
    positions. Fedus et al. take them of all tokens on a device; then the result would depend on the micro-batch.

    Shape: (B, A, K) int64 to the same. Cost: one all-reduce of 8 B T K bytes over cp.
    """
    num_rows, num_own, top_k = experts_BAK.shape
    num_positions = num_own * cp.size
    row_BTK = experts_BAK.new_zeros(num_rows, num_positions, top_k)
    row_BTK[:, columns_A] = experts_BAK
    row_BTK = start_all_reduce(row_BTK, cp)()
    taken_BTE = row_BTK.new_zeros(num_rows, num_positions, num_experts).scatter_(2, row_BTK, 1).cumsum(dim=1)
    is_kept_BTK = taken_BTE.gather(2, row_BTK) <= expert_capacity(num_positions, top_k, num_experts, capacity_factor)
    return torch.where(is_kept_BTK[:, columns_A], experts_BAK, num_experts)


def expert_capacity(num_positions: int, top_k: int, num_experts: int, capacity_factor: float) -> int:
    """Tokens of a row that an expert takes at most."""
    return int(-(-capacity_factor * num_positions * top_k // num_experts))


def move_bias(bias_E: torch.Tensor, counts_E: torch.Tensor, rate: float) -> None:
    """Moves the bias of experts by `rate` against their load, in place: up where it was under the mean.

    Shape: (E) fp32 and (E) int64, tokens of the global batch. Whole numbers: equal on all ranks to the bit.
    Source: Wang et al. 2024, arXiv 2408.15664, algorithm 1.
    """
    bias_E += rate * torch.sign(counts_E.sum() - counts_E * len(counts_E)).to(bias_E.dtype)
