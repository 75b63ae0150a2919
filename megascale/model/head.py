"""The last layer: the residual stream to one logit per token id, or to the loss of the labels.

Shapes: B rows, T positions, D d_model, V padded vocabulary, v = V / tp.
"""

import torch
import torch.nn.functional as F
from torch import nn

from megascale.config.model import ModelConfig
from megascale.model.attention_core import bend
from megascale.model.axes import Axes
from megascale.model.context import Context
from megascale.model.loss import linear_cross_entropy
from megascale.model.mup import logit_scale
from megascale.parallel.collectives import copy_to, gather

HITS_ELEMENTS = 2**22
"""Logits held at a time to count hits."""


class Head(nn.Module):
    """Logits of the next token. Ids that only pad the vocabulary get minus infinity: no softmax gives them anything.

    Attributes:
        label_smoothing: share of a label's probability that is spread over all ids, in training only.
    """

    label_smoothing = 0.0

    def __init__(self, config: ModelConfig, axes: Axes):
        super().__init__()
        self.tp, self.is_sequence_parallel = axes.tp, axes.is_sequence_parallel
        self.weight = nn.Parameter(torch.empty(config.padded_vocab_size // axes.tp.size, config.d_model))
        self.vocab_size, self.softcap = config.vocab_size, config.logit_softcap
        self.scale = logit_scale(config)

    def forward(
        self, hidden_BTD: torch.Tensor, context: Context, last_B: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits of all positions, or of position `last_B` of each row; whole on every tp rank.

        Shape: (B, T, D) to (B, T, V), or with `last_B` (B) int64 to (B, V).
        """
        hidden_BTD = self.share(hidden_BTD)
        if last_B is not None:
            hidden_BTD = hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B]
        bias_v = self.padding_bias()
        if self.softcap is None:
            return gather(F.linear(hidden_BTD, self.weight, bias_v), self.tp, -1)
        logits = bend(F.linear(hidden_BTD, self.weight).float(), self.softcap).to(hidden_BTD.dtype)
        return gather(logits if bias_v is None else logits + bias_v, self.tp, -1)

    def loss(self, hidden_BTD: torch.Tensor, context: Context, labels_BT: torch.Tensor) -> torch.Tensor:
        """Sum of negative log-likelihoods of the labels in nats, fp32, equal on every tp rank; no logits are kept."""
        hidden_ND = self.share(hidden_BTD).flatten(0, 1)
        labels_N = labels_BT.flatten()
        return linear_cross_entropy(
            hidden_ND, self.weight, labels_N, self.vocab_size, self.tp, self.softcap,
            label_smoothing=self.label_smoothing if self.training else 0.0,
        )

    def count_hits(
        self, hidden_BTD: torch.Tensor, context: Context, labels_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(labels whose logit is the largest, labels), int64 scalars, equal on every tp rank.

        Cost: as the loss without gradients; over tp 12 bytes a position. Of equal logits the lowest id counts.
        """
        hidden_ND, labels_N = self.share(hidden_BTD).flatten(0, 1), labels_BT.flatten()
        bias_v, first_id = self.padding_bias(), self.tp.rank * len(self.weight)
        num_rows = max(1, HITS_ELEMENTS // len(self.weight))
        hits = labels_N.new_zeros(())
        for hidden_nD, labels_n in zip(hidden_ND.split(num_rows), labels_N.split(num_rows), strict=True):
            best_n, ids_n = F.linear(hidden_nD, self.weight, bias_v).max(dim=-1)
            best_nt, ids_nt = gather(best_n[:, None], self.tp, 1), gather(ids_n[:, None] + first_id, self.tp, 1)
            ids_n = ids_nt.gather(1, best_nt.argmax(dim=1, keepdim=True))[:, 0]
            hits += ((ids_n == labels_n) & (labels_n >= 0)).sum()
        return hits, (labels_N >= 0).sum()

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
        if self.scale != 1:
            hidden_BTD = hidden_BTD * self.scale
        return gather(hidden_BTD, self.tp, 1) if self.is_sequence_parallel else copy_to(hidden_BTD, self.tp)
