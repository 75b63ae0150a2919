"""Consecutive layers of a model as one callable: the whole model, or what a pipeline rank runs at a time.

Shapes: B rows, T positions, D d_model, V padded vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import nn

from megascale.model.context import Context
from megascale.model.head import Head


class Stage(nn.Module):
    """Runs its layers in order. It only refers to them: names and parameters are the root module's.

    Args:
        layers: in the model's order, without the head.
        head: the model's last layer on the stage that ends with it, None on the others.
    """

    def __init__(self, layers: Sequence[nn.Module], head: Head | None):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.head = head

    def forward(
        self,
        inputs: torch.Tensor,
        context: Context,
        labels_BT: torch.Tensor | None = None,
        last_B: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the next stage takes; from the last one the loss, or logits when there are no labels.

        Shape: (B, T) int64 on the first stage and (B, T, D) on the others, to (B, T, D). On the last: an fp32 scalar,
            the sum of negative log-likelihoods in nats; or (B, T, V), or with `last_B` (B) int64 (B, V).
        """
        hidden = inputs
        for layer in self.layers:
            hidden = layer(hidden, context)
        if self.head is None:
            return hidden
        return self.head(hidden, context, last_B) if labels_BT is None else self.head.loss(hidden, context, labels_BT)
