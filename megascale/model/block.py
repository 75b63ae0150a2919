"""The repeated layer: attention and feed-forward, each added to the residual stream, with the family's norms.

Shapes: B rows, T positions, D d_model; T is the residual stream's, a tp-th of the row when sequence parallel.
"""

from dataclasses import replace

import torch
from torch import nn

from megascale.config.model import ModelConfig
from megascale.model.attention import Attention
from megascale.model.axes import Axes
from megascale.model.context import Context
from megascale.model.dropout import Dropout
from megascale.model.feed_forward import build_feed_forward
from megascale.model.norm import build_norm
from megascale.model.recompute import MemoryPlan, run_block, run_joined
from megascale.parallel.collectives import copy_to, gather, reduce_from, reduce_scatter


class Block(nn.Module):
    """x = x + attention(norm(x)); x = x + feed_forward(norm(x)).

    Args:
        name: global name, which keeps dropout masks apart and says which block of its stack this is.
        feed_forward: in place of the family's.

    Attributes:
        memory: what the backward pass finds of the activations, and where, see `recompute.py`.

    Shape: (B, T, D) to (B, T, D).
    Source: pre-norm order of GPT-2, Radford et al. 2019, section 2.3.
    """

    def __init__(self, config: ModelConfig, name: str, axes: Axes, feed_forward: nn.Module | None = None):
        super().__init__()
        self.memory = MemoryPlan()
        self.attention_norm = build_norm(config)
        self.attention = Attention(config, name, axes)
        self.attention_dropout = Dropout(config.dropout, site=f"{name}.attention")
        self.feed_forward_norm = build_norm(config)
        self.feed_forward = feed_forward or build_feed_forward(config, axes)
        self.feed_forward_dropout = Dropout(config.dropout, site=f"{name}.feed_forward")

    def forward(self, hidden_BTD: torch.Tensor, context: Context) -> torch.Tensor:
        return run_block(self.memory, self.attend, self.feed, hidden_BTD, context)

    def attend(self, hidden_BTD: torch.Tensor, context: Context) -> torch.Tensor:
        """The first half: every position reads others."""
        attended_BTD = self.attention(self.attention_norm(hidden_BTD), context)
        return hidden_BTD + self.attention_dropout(attended_BTD, context)

    def feed(self, hidden_BTD: torch.Tensor, context: Context) -> torch.Tensor:
        """The second half: every position by itself."""
        fed_BTD = self.feed_forward(self.feed_forward_norm(hidden_BTD), context)
        return hidden_BTD + self.feed_forward_dropout(fed_BTD, context)


class PostNormBlock(Block):
    """x = norm(x + attention(x)); x = norm(x + feed_forward(x)).

    Source: Vaswani et al. 2017, section 3.1; Devlin et al. 2019 (BERT).
    """

    def attend(self, hidden_BTD: torch.Tensor, context: Context) -> torch.Tensor:
        attended_BTD = self.attention(hidden_BTD, context)
        return self.attention_norm(hidden_BTD + self.attention_dropout(attended_BTD, context))

    def feed(self, hidden_BTD: torch.Tensor, context: Context) -> torch.Tensor:
        fed_BTD = self.feed_forward(hidden_BTD, context)
        return self.feed_forward_norm(hidden_BTD + self.feed_forward_dropout(fed_BTD, context))


class ParallelBlock(nn.Module):
    """x = x + attention(norm(x)) + feed_forward(norm(x)): one norm, and both halves read the same input.

    Over tp both halves share one exchange before them and one after: parts of both sums are added, then summed over the
    ranks. The config's check has made sure that there are no biases, which would be added on every rank.

    Shape: (B, T, D) to (B, T, D).
    Cost: over tp one all-reduce forward and one backward, where two halves after each other have two; when sequence
        parallel an all-gather and a reduce-scatter each, and the gathered input is kept.
    Source: Chowdhery et al. 2022 (PaLM), section 2; Wang and Komatsuzaki 2021 (GPT-J).
    """

    def __init__(self, config: ModelConfig, name: str, axes: Axes):
        super().__init__()
        self.memory, self.tp, self.is_sequence_parallel = MemoryPlan(), axes.tp, axes.is_sequence_parallel
        joined = replace(axes, is_joined=True)
        self.norm = build_norm(config)
        self.attention = Attention(config, name, joined)
        self.feed_forward = build_feed_forward(config, joined)
        self.dropout = Dropout(config.dropout, site=name)

    def forward(self, hidden_BTD: torch.Tensor, context: Context) -> torch.Tensor:
        return run_joined(self.memory, self.attend_and_feed, hidden_BTD, context)

    def attend_and_feed(self, hidden_BTD: torch.Tensor, context: Context) -> torch.Tensor:
        """The whole block."""
        normed_BTD, is_shards = self.norm(hidden_BTD), self.is_sequence_parallel
        shared_BTD = gather(normed_BTD, self.tp, 1) if is_shards else copy_to(normed_BTD, self.tp)
        part_BTD = self.attention(shared_BTD, context) + self.feed_forward(shared_BTD)
        update_BTD = reduce_scatter(part_BTD, self.tp, 1) if is_shards else reduce_from(part_BTD, self.tp)
        return hidden_BTD + self.dropout(update_BTD, context)
