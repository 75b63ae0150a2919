"""The context of a micro-batch of a model with an encoder and a decoder.

Shapes: B rows, S positions of the encoder, T of the decoder.
"""

import torch

from megascale.config.model import ModelConfig
from megascale.model.attention_mask import AttentionMask, visible
from megascale.model.axes import ONE_RANK, Axes
from megascale.model.context import Context, restarted_positions


def build_pair_context(
    config: ModelConfig,
    num_source: int,
    num_target: int,
    device: torch.device,
    axes: Axes = ONE_RANK,
    *,
    source_documents_BS: torch.Tensor | None = None,
    documents_BT: torch.Tensor | None = None,
    row_keys_B: torch.Tensor | None = None,
    loss_factor: torch.Tensor | None = None,
) -> Context:
    """The decoder's context, with the encoder's as its `source`.

    A position sees its own document in both parts. Each document of the decoder's part must be in the encoder's, since
    a query without a key has no softmax.

    Args:
        num_source: positions of the encoder's rows.
        num_target: positions of the decoder's rows.
        source_documents_BS: number of the document of each position of the encoder, never falling along a row; padding
            has a number of its own. None: a row is one document.
        documents_BT: of the decoder, likewise. None for both or for neither.

    Cost: B S^2 + B T^2 + B S T bytes where there are documents, else nothing.
    """
    source = _stack_context(num_source, device, axes, source_documents_BS, row_keys_B, is_causal=False)
    target = _stack_context(num_target, device, axes, documents_BT, row_keys_B, is_causal=config.traits.is_causal)
    columns_T, seen_B1TS = target.mask.columns_T, None
    if documents_BT is not None:
        columns_S = source.mask.columns_T
        seen_B1TS = visible(columns_T, columns_S, documents_BT, source_documents_BS, None, is_causal=False)[:, None]
    cross_mask = AttentionMask(columns_T, None, None, seen_B1TS, None, is_causal=False)
    return target._replace(source=source, cross_mask=cross_mask, loss_factor=loss_factor)


def _stack_context(
    num_positions: int, device: torch.device, axes: Axes, documents_BT: torch.Tensor | None,
    row_keys_B: torch.Tensor | None, *, is_causal: bool,
) -> Context:
    """The context of one stack by itself; its mask is dense, as a bias on scores needs it."""
    columns_A = torch.arange(num_positions, device=device)
    columns_T = columns_A.chunk(axes.tp.size)[axes.tp.rank] if axes.is_sequence_parallel else columns_A
    positions, seen_B1TS = columns_A[None], None
    if documents_BT is not None:
        positions = restarted_positions(documents_BT)
        seen_BTS = visible(columns_A, columns_A, documents_BT, documents_BT, None, is_causal=is_causal)
        seen_B1TS = seen_BTS[:, None]
    mask = AttentionMask(columns_A, documents_BT, None, seen_B1TS, None, is_causal)
    return Context(positions[:, columns_T], columns_T, None, None, row_keys_B, mask)
