"""The last layer of a vision transformer: the class token, or the mean of all patches, to the class of the image.

Shapes: B rows, T positions, D d_model, V padded number of classes, v = V / tp.
"""

import torch
import torch.nn.functional as F
from torch import nn

from megascale.config.model import ModelConfig
from megascale.model.axes import Axes
from megascale.model.context import Context
from megascale.model.head import Head
from megascale.model.loss import linear_cross_entropy
from megascale.parallel.collectives import gather

TOP_CLASSES = 5
"""First choices among which the class may be, as is usual beside the very first (Russakovsky et al. 2015)."""


class ImageHead(Head):
    """Logits of the classes, with a bias. They are cut over tp and padded as a vocabulary is.

    Source: Dosovitskiy et al. 2020, section 3.1; the mean: Zhai et al. 2022, arXiv 2106.04560, section 3.4.
    """

    def __init__(self, config: ModelConfig, axes: Axes):
        super().__init__(config, axes)
        self.has_cls = config.vision.has_cls
        self.bias = nn.Parameter(torch.empty(len(self.weight)))

    def forward(
        self, hidden_BTD: torch.Tensor, context: Context, last_B: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Shape: (B, T, D) to (B, 1, V), whole on every tp rank; an image has one answer, wherever `last_B` points."""
        padding_v = self.padding_bias()
        bias_v = self.bias if padding_v is None else self.bias + padding_v
        return gather(F.linear(self.pool(hidden_BTD), self.weight, bias_v), self.tp, -1)[:, None]

    def loss(self, hidden_BTD: torch.Tensor, context: Context, labels_BT: torch.Tensor) -> torch.Tensor:
        """Sum of negative log-likelihoods of the labels (B, 1) in nats, fp32, equal on every tp rank."""
        return linear_cross_entropy(
            self.pool(hidden_BTD), self.weight, labels_BT[:, 0], self.vocab_size, self.tp, bias_v=self.bias
        )

    def count_hits(
        self, hidden_BTD: torch.Tensor, context: Context, labels_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(images whose class has the largest logit, images with a label), int64 scalars, equal on every tp rank."""
        hits_B1 = self(hidden_BTD, context).argmax(dim=-1) == labels_BT
        return hits_B1.sum(), (labels_BT >= 0).sum()

    def count_near(self, hidden_BTD: torch.Tensor, context: Context, labels_BT: torch.Tensor) -> torch.Tensor:
        """Images whose class is among the five largest logits, int64 scalar, equal on every tp rank.

        Of five classes or fewer it says nothing: all images are then counted.
        """
        num_choices = min(TOP_CLASSES, self.vocab_size)
        best_B1t = self(hidden_BTD, context).topk(num_choices, dim=-1).indices
        return (best_B1t == labels_BT[..., None]).sum()

    def pool(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """What the classes are told from. Shape: (B, T, D) to (B, D)."""
        hidden_BTD = self.share(hidden_BTD)
        return hidden_BTD[:, 0] if self.has_cls else hidden_BTD.mean(dim=1)
