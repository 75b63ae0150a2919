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


class MaskedImage(NamedTuple):
    """What masked-image pretraining hides, and what its decoder needs to tell it.

    Legend: N visible patches, T all patches, P numbers of a patch.

    Attributes:
        visible_BN: int64, the patches that the encoder sees, rising.
        patches_BTP: fp32, the numbers of each patch, by row, column and colour.
        decoder: the context of the decoder, which sees all positions.
    """

    visible_BN: torch.Tensor
    patches_BTP: torch.Tensor
    decoder: "Context"


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
        pair_weight: factor of the loss of a pair of segments, against that of one token.
        source: of the encoder, in a model with a decoder.
        cross_mask: which of the encoder's positions each query of the decoder sees.
        loss_factor: fp32 scalar by which the sum of losses is multiplied before the backward pass; layers that add a
            loss of their own to the gradient take it too. None where there is no backward pass.
        num_labels_B: labels of each whole row, by which such layers weigh their losses; None: one a position.
        cache: keys and values of earlier positions, in generation.
        masked_image: of masked-image pretraining; None elsewhere.
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
    num_labels_B: torch.Tensor | None = None
    cache: object | None = None
    pair_weight: float = 1.0
    masked_image: MaskedImage | None = None


def build_context(
    config: ModelConfig,
    num_positions: int,
    device: torch.device,
    axes: Axes = ONE_RANK,
    *,
    documents_BT: torch.Tensor | None = None,
    row_keys_B: torch.Tensor | None = None,
    loss_factor: torch.Tensor | None = None,
    num_labels_B: torch.Tensor | None = None,
    segments_BT: torch.Tensor | None = None,
    pair_weight: float = 1.0,
) -> Context:
    """Builds the context of a micro-batch on this rank.

    Args:
        num_positions: of the whole row.
        num_labels_B: see `Context`.
        documents_BT: number of the document of each position of the whole row; attention stays within documents and
            positions count from each one's start. None: a row is one document.
        segments_BT: of each position of the whole row, where there are segments.
        pair_weight: see `Context`.
    """
    columns_A = cp_columns(num_positions, axes, device)
    columns_T = columns_A.chunk(axes.tp.size)[axes.tp.rank] if axes.is_sequence_parallel else columns_A
    whole_row = torch.arange(num_positions, device=device)[None]
    positions = whole_row if documents_BT is None else restarted_positions(documents_BT)
    cos_BA1C, sin_BA1C = rotary_of(config, positions[:, columns_A])
    is_causal = config.traits.is_causal
    is_bent = config.attention_softcap is not None
    mask = build_mask(columns_A, documents_BT, config.window, axes, device, is_causal=is_causal, is_bent=is_bent)
    global_mask = None
    if config.global_every:
        global_mask = build_mask(columns_A, documents_BT, None, axes, device, is_causal=is_causal, is_bent=is_bent)
    return Context(
        positions[:, columns_T], columns_T, cos_BA1C, sin_BA1C, row_keys_B, mask, global_mask=global_mask,
        loss_factor=loss_factor, num_labels_B=num_labels_B, pair_weight=pair_weight,
        segments_BT=None if segments_BT is None else segments_BT[:, columns_T],
    )


def rotary_of(config: ModelConfig, positions_BA: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Cosines and signed sines (B, A, 1, C) of positions, fp32; None twice for families without rotary positions."""
    if not config.is_rotary:
        return None, None
    return rotary_table(positions_BA, config.head_dim, config.rotary_base, config.rope_scaling)


def restarted_positions(documents_BT: torch.Tensor) -> torch.Tensor:
    """Positions that count from 0 within each document.

    Shape: (B, T), integers, to (B, T) int64.
    """
    columns_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    is_start_BT = documents_BT.diff(dim=1, prepend=documents_BT[:, :1] - 1) != 0
    return columns_T - torch.where(is_start_BT, columns_T, 0).cummax(dim=1).values
