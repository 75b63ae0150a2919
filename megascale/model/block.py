"""The repeated layer: attention and feed-forward, each added to the residual stream, with the family's norms.

Shapes: B rows, T positions, D d_model; T is the residual stream's, a tp-th of the row when sequence parallel.
"""

import torch
from torch import nn

from megascale.config.model import ModelConfig
from megascale.model.attention import Attention
from megascale.model.axes import Axes
from megascale.model.context import Context
from megascale.model.dropout import Dropout
from megascale.model.feed_forward import build_feed_forward
from megascale.model.norm import build_norm
from megascale.model.recompute import MemoryPlan, run_block


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
        fed_BTD = self.feed_forward(self.feed_forward_norm(hidden_BTD))
        return hidden_BTD + self.feed_forward_dropout(fed_BTD, context)


class PostNormBlock(Block):
    """x = norm(x + attention(x)); x = norm(x + feed_forward(x)).

    Source: Vaswani et al. 2017, section 3.1; Devlin et al. 2019 (BERT).
    """

    def attend(self, hidden_BTD: torch.Tensor, context: Context) -> torch.Tensor:
        attended_BTD = self.attention(hidden_BTD, context)
        return self.attention_norm(hidden_BTD + self.attention_dropout(attended_BTD, context))

    def feed(self, hidden_BTD: torch.Tensor, context: Context) -> torch.Tensor:
        fed_BTD = self.feed_forward(hidden_BTD)
        return self.feed_forward_norm(hidden_BTD + self.feed_forward_dropout(fed_BTD, context))
