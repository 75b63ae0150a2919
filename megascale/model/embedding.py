"""The first layer: token ids, and learned positions where the family has them, to the residual stream.

Shapes: B rows, T positions, D d_model, V padded vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn

from megascale.config.model import ModelConfig
from megascale.model.context import Context
from megascale.model.dropout import Dropout


class Table(nn.Module):
    """One vector per id, on uninitialised memory."""

    def __init__(self, num_ids: int, d_model: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_ids, d_model))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight)


class Embedding(nn.Module):
    """Adds token and, when asked for, position vectors.

    Shape: (B, T) int64 to (B, T, D).
    """

    def __init__(self, config: ModelConfig, has_positions: bool):
        super().__init__()
        self.tokens = Table(config.padded_vocab_size, config.d_model)
        self.positions = Table(config.max_seq_len, config.d_model) if has_positions else None
        self.dropout = Dropout(config.dropout, site="embedding")

    def forward(self, tokens_BT: torch.Tensor, context: Context) -> torch.Tensor:
        hidden_BTD = self.tokens(tokens_BT)
        if self.positions is not None:
            hidden_BTD = hidden_BTD + self.positions(context.position_ids_BT)
        return self.dropout(hidden_BTD, context)
