"""The last layer of BERT: logits of masked tokens, and of whether two segments belong together.

Only positions with a label reach the product with the vocabulary: an eighth of it in training, where 15 % have one.

Shapes: B rows, T positions, D d_model, V padded vocabulary, v = V / tp, N positions with a label.
Source: Devlin et al. 2019, section 3.1 and appendix A.2; the transform is that of the published code.
"""

import torch
import torch.nn.functional as F
from torch import nn

from megascale.config.model import ModelConfig
from megascale.data.objectives import IGNORED_LABEL, PAIR_LABELS
from megascale.model.axes import Axes
from megascale.model.context import Context
from megascale.model.feed_forward import ACTIVATIONS
from megascale.model.head import Head
from megascale.model.linear import Linear
from megascale.model.loss import linear_cross_entropy
from megascale.model.norm import build_norm
from megascale.parallel.axis import ALONE
from megascale.parallel.collectives import gather, reduce_from


class MaskedHead(Head):
    """norm(activation(x W + b)) times the token embedding, plus a bias; with `pair_head` two classes from [CLS] too.

    The transform is whole on every tp rank and, when sequence parallel, works on its positions: its gradient is then
    partial over tp like that of a norm. The bias is cut like the vocabulary.
    """

    def __init__(self, config: ModelConfig, axes: Axes):
        super().__init__(config, axes)
        self.transform = Linear(config.d_model, config.d_model, bias=config.has_bias)
        self.activation = ACTIVATIONS[config.feed_forward]
        self.norm = build_norm(config)
        self.bias = nn.Parameter(torch.empty(len(self.weight))) if config.has_bias else None
        self.pairs = NextSentenceHead(config, axes) if config.pair_head else None

    def forward(
        self, hidden_BTD: torch.Tensor, context: Context, last_B: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits of the token at each position, or at position `last_B` of each row; whole on every tp rank.

        Shape: (B, T, D) to (B, T, V), or with `last_B` (B) int64 to (B, V).
        """
        hidden_BTD = self.transformed(hidden_BTD)
        if last_B is not None:
            hidden_BTD = hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B]
        return self.logits(hidden_BTD)

    def loss(self, hidden_BTD: torch.Tensor, context: Context, labels_BT: torch.Tensor) -> torch.Tensor:
        """Sum of negative log-likelihoods of the masked tokens in nats, fp32, equal on every tp rank.

        With a pair head those of the pairs are added, times `context.pair_weight`.
        """
        chosen_ND, labels_N = self.labelled(hidden_BTD, labels_BT)
        nll = linear_cross_entropy(chosen_ND, self.weight, labels_N, self.vocab_size, self.tp, bias_v=self.bias)
        if self.pairs is None:
            return nll
        return nll + context.pair_weight * self.pairs.loss(hidden_BTD, labels_BT)

    def count_hits(
        self, hidden_BTD: torch.Tensor, context: Context, labels_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(masked tokens whose logit is the largest, masked tokens), int64 scalars, equal on every tp rank."""
        chosen_ND, labels_N = self.labelled(hidden_BTD, labels_BT)
        return (self.logits(chosen_ND).argmax(dim=-1) == labels_N).sum(), labels_N.new_tensor(len(labels_N))

    def transformed(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """What the vocabulary is multiplied with, at all positions."""
        return self.share(self.norm(self.activation(self.transform(hidden_BTD))))

    def labelled(self, hidden_BTD: torch.Tensor, labels_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The transformed state of the positions with a label, and their labels. Shape: (N, D), (N) int64.

        Cost: waits for the device, to know how many there are.
        """
        labels = labels_BT.flatten()
        places_N = (labels >= 0).nonzero()[:, 0]
        return self.transformed(hidden_BTD).flatten(0, 1).index_select(0, places_N), labels[places_N]

    def logits(self, transformed: torch.Tensor) -> torch.Tensor:
        """Shape: (..., D) to (..., V)."""
        padding_v = self.padding_bias()
        bias_v = padding_v if self.bias is None else self.bias if padding_v is None else self.bias + padding_v
        return gather(F.linear(transformed, self.weight, bias_v), self.tp, -1)


class NextSentenceHead(nn.Module):
    """Whether the second segment of a row follows the first: tanh(x W + b) of the first position, then two classes.

    Its weights are whole on every rank. The first position is on the first cp rank and, when sequence parallel, on its
    first tp rank alone; all others compute the same on a position of theirs, without label, so that all ranks use
    the same parameters at the same time, as ZeRO-3 wants it.
    """

    def __init__(self, config: ModelConfig, axes: Axes):
        super().__init__()
        self.sharing = axes.tp if axes.is_sequence_parallel else ALONE
        self.has_start = self.sharing.rank == 0  # of cp ranks only the first has the labels of pairs
        self.pooler = Linear(config.d_model, config.d_model, bias=config.has_bias)
        self.classes = Linear(config.d_model, len(PAIR_LABELS), bias=config.has_bias)

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Logits of "in order" and "not", where the row begins on this rank. Shape: (B, T, D) to (B, 2)."""
        return self.classes(torch.tanh(self.pooler(hidden_BTD[:, 0])))

    def loss(self, hidden_BTD: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        """Sum of negative log-likelihoods in nats over the rows with a pair label at their start, fp32, equal on every
        tp rank; 0 on cp ranks without the start.
        """
        classes_B = torch.full_like(labels_BT[:, 0], IGNORED_LABEL)
        if self.has_start:
            for number, label in enumerate(PAIR_LABELS):
                classes_B = torch.where(labels_BT[:, 0] == label, number, classes_B)
        nll = F.cross_entropy(self(hidden_BTD).float(), classes_B, ignore_index=IGNORED_LABEL, reduction="sum")
        return reduce_from(nll, self.sharing)
