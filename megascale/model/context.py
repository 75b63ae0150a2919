
"""What every layer may need besides the hidden state, computed once per micro-batch and equal on every stage.

Shapes: B rows, T positions, C head_dim.
"""

from typing import NamedTuple

import torch

from megascale.config.model import ModelConfig
from megascale.model.rope import rotary_table


class Context(NamedTuple):
    """Tensors beside the hidden state. A leading 1 in place of B means that all rows agree.

    Attributes:
        position_ids_BT: int64, position of each token within its document; drives position embeddings.
        columns_T: int64, position of each token within the row; drives dropout, and unlike `position_ids_BT` never
            starts again at a document.
        cos_BT1C: fp32 rotary cosines, None for families without rotary positions.
        sin_BT1C: fp32 rotary sines, negated in the first half of the features, None likewise.
        row_keys_B: int64, one random key per row from `dropout.derive_row_keys`; None where nothing is dropped.
    """

    position_ids_BT: torch.Tensor
    columns_T: torch.Tensor
    cos_BT1C: torch.Tensor | None
    sin_BT1C: torch.Tensor | None
    row_keys_B: torch.Tensor | None


def build_context(
    config: ModelConfig,
    num_positions: int,
    device: torch.device,
    *,
    position_ids_BT: torch.Tensor | None = None,
    row_keys_B: torch.Tensor | None = None,
) -> Context:
    """Builds the context of a micro-batch; positions count from 0 through each row unless they are given."""
    columns_T = torch.arange(num_positions, device=device)
    if position_ids_BT is None:
        position_ids_BT = columns_T[None]
    cos_BT1C = sin_BT1C = None
    if config.is_rotary:
        cos_BT1C, sin_BT1C = rotary_table(position_ids_BT, config.head_dim, config.rotary_base)
    return Context(position_ids_BT, columns_T, cos_BT1C, sin_BT1C, row_keys_B)
