"""The first layer: token ids, and learned positions where the family has them, to the residual stream.

Shapes: B rows, T positions, D d_model, V padded vocabulary; T is the residual stream's, a tp-th of the row when
sequence parallel.
"""

import torch
import torch.nn.functional as F
from torch import nn

from megascale.config.model import ModelConfig
from megascale.model.axes import Axes
from megascale.model.context import Context
from megascale.model.dropout import Dropout
from megascale.parallel.axis import ALONE, Axis
from megascale.parallel.collectives import reduce_from, reduce_scatter


class Table(nn.Module):
    """One vector per id, on uninitialised memory. Cut over an axis, a rank has a run of ids and gives zeros for others.

    Shape: ids of any shape to (*ids.shape, D).
    """

    def __init__(self, num_ids: int, d_model: int, axis: Axis):
        super().__init__()
        self.axis = axis
        self.weight = nn.Parameter(torch.empty(num_ids // axis.size, d_model))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.axis.size == 1:
            return F.embedding(ids, self.weight)
        own_ids = ids - self.axis.rank * len(self.weight)
        is_own = (own_ids >= 0) & (own_ids < len(self.weight))
        return F.embedding(torch.where(is_own, own_ids, 0), self.weight) * is_own[..., None]


class Embedding(nn.Module):
    """Adds token and, where the family learns them, position vectors. Over tp the vocabulary is cut, positions are not.

    Shape: (B, row positions) int64 to (B, T, D).
    Cost: over tp one all-reduce of the output, or a reduce-scatter when sequence parallel.
    """

    def __init__(self, config: ModelConfig, axes: Axes):
        super().__init__()
        self.tp, self.is_sequence_parallel = axes.tp, axes.is_sequence_parallel
        is_learned = config.traits.positions == "learned"
        self.tokens = Table(config.padded_vocab_size, config.d_model, axes.tp)
        self.positions = Table(config.max_seq_len, config.d_model, ALONE) if is_learned else None
        self.dropout = Dropout(config.dropout, site="embedding")

    def forward(self, tokens_BT: torch.Tensor, context: Context) -> torch.Tensor:
        return self.dropout(self.sum_up(tokens_BT, context), context)

    def sum_up(self, tokens_BT: torch.Tensor, context: Context) -> torch.Tensor:
        """The sum, on the positions of the residual stream. Shape: (B, row positions) int64 to (B, T, D)."""
        part_BTD = self.tokens(tokens_BT)
        if self.is_sequence_parallel:
            hidden_BTD = reduce_scatter(part_BTD, self.tp, 1)
        else:
            hidden_BTD = reduce_from(part_BTD, self.tp)
        if self.positions is not None:
            hidden_BTD = hidden_BTD + self.positions(context.position_ids_BT)
        return hidden_BTD
