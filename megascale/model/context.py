"""What every layer may need besides the hidden state, computed once per micro-batch on each rank.

Shapes: B rows, T positions of the residual stream on this rank, A positions of attention on this rank, C head_dim.
Without context parallelism A is the whole row; with sequence parallelism T is a tp-th of A.
"""

from typing import NamedTuple

import torch

from megascale.config.model import ModelConfig
from megascale.model.attention_mask import AttentionMask, build_mask, cp_columns
from megascale.model.axes import ONE_RANK, Axes
from megascale.model.rope import rotary_table


class Context(NamedTuple):
    """Tensors beside the hidden state. A leading 1 in place of B means that all rows agree.

    Attributes:
        position_ids_BT: int64, position of each token within its document; drives position embeddings.
        columns_T: int64, position of each token within the row; drives dropout, and unlike `position_ids_BT` never
            starts again at a document.
        cos_BA1C: fp32 rotary cosines, None for families without rotary positions.
        sin_BA1C: fp32 rotary sines, negated in the first half of the features, None likewise.
        row_keys_B: int64, one random key per row from `dropout.derive_row_keys`; None where nothing is dropped.
        mask: which keys each query sees.
        global_mask: the same in the blocks that see all tokens in spite of a window; None where there are none.
        segments_BT: int64, kind of segment of each token; None for families without segments.
        source: of the encoder, in a model with a decoder.
        cross_mask: which of the encoder's positions each query of the decoder sees.
        loss_factor: fp32 scalar by which the sum of losses is multiplied before the backward pass; layers that add a
            loss of their own to the gradient take it too. None where there is no backward pass.
        cache: keys and values of earlier positions, in generation.
    """

    position_ids_BT: torch.Tensor
    columns_T: torch.Tensor
    cos_BA1C: torch.Tensor | None
    sin_BA1C: torch.Tensor | None
    row_keys_B: torch.Tensor | None
    mask: AttentionMask
    global_mask: AttentionMask | None = None
    segments_BT: torch.Tensor | None = None
    source: "Context | None" = None
    cross_mask: AttentionMask | None = None
    loss_factor: torch.Tensor | None = None
    cache: object | None = None


def build_context(
    config: ModelConfig,
    num_positions: int,
    device: torch.device,
    axes: Axes = ONE_RANK,
    *,
    documents_BT: torch.Tensor | None = None,
    row_keys_B: torch.Tensor | None = None,
    loss_factor: torch.Tensor | None = None,
) -> Context:
    """Builds the context of a micro-batch on this rank.

    Args:
        num_positions: of the whole row.
        documents_BT: number of the document of each position of the whole row; attention stays within documents and
            positions count from each one's start. None: a row is one document.
    """
    columns_A = cp_columns(num_positions, axes, device)
    columns_T = columns_A.chunk(axes.tp.size)[axes.tp.rank] if axes.is_sequence_parallel else columns_A
    whole_row = torch.arange(num_positions, device=device)[None]
    positions = whole_row if documents_BT is None else restarted_positions(documents_BT)
    cos_BA1C = sin_BA1C = None
    if config.is_rotary:
        cos_BA1C, sin_BA1C = rotary_table(positions[:, columns_A], config.head_dim, config.rotary_base)
    is_causal = config.traits.is_causal
    mask = build_mask(columns_A, documents_BT, config.window, axes, device, is_causal=is_causal)
    global_mask = None
    if config.global_every:
        global_mask = build_mask(columns_A, documents_BT, None, axes, device, is_causal=is_causal)
    return Context(
        positions[:, columns_T], columns_T, cos_BA1C, sin_BA1C, row_keys_B, mask, global_mask=global_mask,
        loss_factor=loss_factor,
    )


def restarted_positions(documents_BT: torch.Tensor) -> torch.Tensor:
    """Positions that count from 0 within each document.

    Shape: (B, T), integers, to (B, T) int64.
    """
    columns_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    is_start_BT = documents_BT.diff(dim=1, prepend=documents_BT[:, :1] - 1) != 0
    return columns_T - torch.where(is_start_BT, columns_T, 0).cummax(dim=1).values
