"""The last layer: the residual stream to one logit per token id, or to the loss of the labels.

Shapes: B rows, T positions, D d_model, V padded vocabulary, v = V / tp.
"""

import torch
import torch.nn.functional as F
from torch import nn

from megascale.config.model import ModelConfig
from megascale.model.axes import Axes
from megascale.model.context import Context
from megascale.model.loss import linear_cross_entropy
from megascale.parallel.collectives import copy_to, gather


class Head(nn.Module):
    """Logits of the next token. Ids that only pad the vocabulary get minus infinity: no softmax gives them anything."""

    def __init__(self, config: ModelConfig, axes: Axes):
        super().__init__()
        self.tp, self.is_sequence_parallel = axes.tp, axes.is_sequence_parallel
        self.weight = nn.Parameter(torch.empty(config.padded_vocab_size // axes.tp.size, config.d_model))
        self.vocab_size = config.vocab_size

    def forward(
        self, hidden_BTD: torch.Tensor, context: Context, last_B: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits of all positions, or of position `last_B` of each row; whole on every tp rank.

        Shape: (B, T, D) to (B, T, V), or with `last_B` (B) int64 to (B, V).
        """
        hidden_BTD = self.share(hidden_BTD)
        if last_B is not None:
            hidden_BTD = hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B]
        return gather(F.linear(hidden_BTD, self.weight, self.padding_bias()), self.tp, -1)

    def loss(self, hidden_BTD: torch.Tensor, context: Context, labels_BT: torch.Tensor) -> torch.Tensor:
        """Sum of negative log-likelihoods of the labels in nats, fp32, equal on every tp rank; no logits are kept."""
        hidden_ND = self.share(hidden_BTD).flatten(0, 1)
        return linear_cross_entropy(hidden_ND, self.weight, labels_BT.flatten(), self.vocab_size, self.tp)

    def padding_bias(self) -> torch.Tensor | None:
        """A bias that adds 0 to real ids and minus infinity to padding; inside the product it costs no extra pass."""
        num_rows = len(self.weight)
        num_real = self.vocab_size - self.tp.rank * num_rows
        if num_real >= num_rows:
            return None
        bias_v = self.weight.new_zeros(num_rows)
        bias_v[max(num_real, 0) :] = float("-inf")
        return bias_v

    def share(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """The residual stream of all positions, its gradient summed over the ranks that share the vocabulary."""
        return gather(hidden_BTD, self.tp, 1) if self.is_sequence_parallel else copy_to(hidden_BTD, self.tp)
