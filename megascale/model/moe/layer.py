"""A sparse feed-forward layer: a router, the experts that it chooses for each token, and those that take every token.

Shapes: B rows, T positions of the residual stream on this rank, A positions of attention (T without sequence
parallelism), D d_model, E experts, K experts of a token.
"""

import torch
from torch import nn

from megascale.config.model import ModelConfig
from megascale.model.axes import Axes
from megascale.model.context import Context
from megascale.model.feed_forward import build_feed_forward
from megascale.model.moe.balance import AddLoss, Tally, balance_of_rows, count_rows, limit_rows, z_of_rows
from megascale.model.moe.dispatch import route
from megascale.model.moe.experts import Experts
from megascale.model.moe.router import Choice, Router
from megascale.parallel.collectives import (
    copy_to,
    gather,
    reduce_from,
    reduce_scatter,
    start_all_gather,
    start_all_reduce,
)

SEQUENCE_DIM = 1


class MoeLayer(nn.Module):
    """sum over the chosen experts of gate x expert(token), and the shared experts.

    tp cuts the features of each expert: with sequence shards tokens and gates are gathered over tp, and the outputs,
    parts of a sum, are reduced and scattered. ep shares out the experts (`dispatch.py`). The router works on this
    rank's shard.

    Attributes:
        tally: what its router did in training since somebody looked.

    Shape: (B, T, D) to (B, T, D).
    Cost: over tp as a feed-forward layer's, and 2 K numbers a token; over cp one all-reduce of B E counts, with a
        capacity one of B T K more; over ep see `dispatch.py`.
    Source: Shazeer et al. 2017; Fedus et al. 2021 (Switch); Jiang et al. 2024 (Mixtral); Dai et al. 2024 (shared and
        fine-grained experts).
    """

    def __init__(self, config: ModelConfig, axes: Axes):
        super().__init__()
        self.moe, self.axes = config.moe, axes
        self.router = Router(config)
        self.experts = Experts(config, axes)
        num_shared = self.moe.num_shared_experts
        self.shared = build_feed_forward(config, axes, num_shared * config.expert_dim) if num_shared else None
        self.tally = Tally(self.moe.num_experts)

    def forward(self, hidden_BTD: torch.Tensor, context: Context) -> torch.Tensor:
        choice = self.router(hidden_BTD)
        tokens_BAD, gates_BAK, chosen_BAK = self.share(hidden_BTD, choice)
        experts_BAK, may_drop = chosen_BAK, self.moe.capacity_factor is not None and context.cache is None
        if may_drop:
            experts_BAK = limit_rows(
                chosen_BAK, context.mask.columns_T, self.moe.num_experts, self.moe.capacity_factor, self.axes.cp
            )
        output_ND = route(
            self.experts, tokens_BAD.flatten(0, 1), experts_BAK.flatten(0, 1), gates_BAK.flatten(0, 1),
            self.moe.num_experts, self.axes.ep, may_drop=may_drop,
        )
        output_BTD = self.reduce(output_ND.view_as(tokens_BAD))
        if self.shared is not None:
            output_BTD = output_BTD + self.shared(hidden_BTD)
        if context.loss_factor is None or not torch.is_grad_enabled():
            return output_BTD
        return self.add_loss(output_BTD, choice, chosen_BAK, experts_BAK, context)

    def share(self, hidden_BTD: torch.Tensor, choice: Choice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens, gates and choices of all positions that the tp ranks work on together.

        Experts give parts of a sum, so the gradients of tokens and gates are parts too: the backward pass adds them up.
        """
        tp = self.axes.tp
        if not self.axes.is_sequence_parallel:
            return copy_to(hidden_BTD, tp), copy_to(choice.gates_BTK, tp), choice.experts_BTK
        experts_BAK = start_all_gather(choice.experts_BTK, tp, SEQUENCE_DIM)
        return gather(hidden_BTD, tp, SEQUENCE_DIM), gather(choice.gates_BTK, tp, SEQUENCE_DIM), experts_BAK()

    def reduce(self, output_BAD: torch.Tensor) -> torch.Tensor:
        """The sum over tp, of this rank's positions."""
        tp = self.axes.tp
        if self.axes.is_sequence_parallel:
            return reduce_scatter(output_BAD, tp, SEQUENCE_DIM)
        return reduce_from(output_BAD, tp)

    def add_loss(
        self, output_BTD: torch.Tensor, choice: Choice, chosen_BAK: torch.Tensor, experts_BAK: torch.Tensor,
        context: Context,
    ) -> torch.Tensor:
        """The output, with the losses of `balance.py` in its backward pass.

        Args:
            chosen_BAK: by the router.
            experts_BAK: the same without what was dropped.
        """
        moe, cp = self.moe, self.axes.cp
        num_positions = chosen_BAK.shape[1] * cp.size
        own_counts_BE = count_rows(chosen_BAK, moe.num_experts)
        counts_BE = start_all_reduce(own_counts_BE, cp)()
        balance_B = balance_of_rows(choice.shares_BTE, counts_BE, num_positions, moe.top_k)
        z_B = z_of_rows(choice.logits_BTE, num_positions)
        labels_B = num_positions if context.num_labels_B is None else context.num_labels_B
        balance, z = (labels_B * balance_B).sum(), (labels_B * z_B).sum()
        loss = (moe.balance_weight if moe.balance == "loss" else 0.0) * balance + moe.z_weight * z
        num_dropped = (experts_BAK == moe.num_experts).sum()
        return AddLoss.apply(
            output_BTD, loss, context.loss_factor, torch.cat((own_counts_BE.sum(dim=0), num_dropped[None])),
            torch.stack((balance, z)).detach(), self.tally,
        )
