"""The first layer of an encoder: token, position and segment vectors, added up and normalised.

Shapes: B rows, T positions of the residual stream (a tp-th of the row when sequence parallel), D d_model.
"""

import torch

from megascale.config.model import ModelConfig
from megascale.model.axes import Axes
from megascale.model.context import Context
from megascale.model.embedding import Embedding, Table
from megascale.model.norm import build_norm
from megascale.parallel.axis import ALONE


class SegmentEmbedding(Embedding):
    """dropout(norm(token + position + segment)). Without segments in the context all tokens are of segment 0.

    Shape: (B, row positions) int64 to (B, T, D).
    Cost: as `Embedding`; segments and norm are whole on every tp rank and work on its positions.
    Source: Devlin et al. 2019, section 3; the norm is that of the published code.
    """

    def __init__(self, config: ModelConfig, axes: Axes):
        super().__init__(config, axes)
        self.segments = Table(config.num_segments, config.d_model, ALONE)
        self.norm = build_norm(config)

    def forward(self, tokens_BT: torch.Tensor, context: Context) -> torch.Tensor:
        segments_BT = context.segments_BT
        if segments_BT is None:
            segments_BT = torch.zeros_like(context.position_ids_BT)
        hidden_BTD = self.sum_up(tokens_BT, context) + self.segments(segments_BT)
        return self.dropout(self.norm(hidden_BTD), context)
