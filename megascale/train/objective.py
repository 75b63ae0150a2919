"""What a micro-batch is trained on: inputs, context and labels of this rank's positions."""

import torch

from megascale.config.bert_rules import masked_tokens
from megascale.config.model import ModelConfig
from megascale.config.schema import RunConfig
from megascale.engine.base import Objective
from megascale.model.axes import Axes
from megascale.model.context import build_context
from megascale.model.dropout import derive_row_keys
from megascale.model.pair_context import build_pair_context
from megascale.train.image_objective import image_objective


def run_objective(config: RunConfig, axes: Axes) -> Objective:
    """The objective of a run."""
    if config.model.vision is not None:
        return image_objective(config, axes)
    if config.model.traits.has_decoder:
        return pair_objective(config.model, config.run.seed, axes)
    # Seen from both sides, padding must be kept apart: it is a document of its own.
    has_documents = config.data.document_mask or not config.model.traits.is_causal
    return token_objective(config.model, config.run.seed, axes, has_documents, masked_tokens(config))


def token_objective(
    config: ModelConfig, seed: int, axes: Axes, has_document_mask: bool, pair_weight: float = 1.0
) -> Objective:
    """One stack over tokens: a label for each position, or for some. Dropout is keyed by (seed, step, row).

    Args:
        has_document_mask: whether attention stays within documents; if not, a row is one.
        pair_weight: factor of the loss of a pair of segments, where rows are such.
    """

    def prepare(batch, step: int, loss_factor) -> tuple:
        num_positions = batch.tokens_BT.shape[1]
        context = build_context(
            config, num_positions, batch.tokens_BT.device, axes,
            documents_BT=batch.documents_BT if has_document_mask else None,
            row_keys_B=derive_row_keys(batch.row_numbers_B, seed, step) if config.dropout else None,
            loss_factor=loss_factor,
            num_labels_B=(batch.labels_BT >= 0).sum(dim=1) if config.moe else None,
            segments_BT=batch.segments_BT,
            pair_weight=pair_weight,
        )
        if axes.cp.size == 1:
            return batch.tokens_BT, context, batch.labels_BT
        columns_A = context.mask.columns_T
        return batch.tokens_BT[:, columns_A], context, batch.labels_BT[:, columns_A]

    return prepare


def pair_objective(config: ModelConfig, seed: int, axes: Axes) -> Objective:
    """An encoder and a decoder: tokens of the source and, behind them, of the target; labels of the target's positions.

    Documents are always told apart, since padding of a source is one.
    """

    def prepare(batch, step: int, loss_factor) -> tuple:
        context = build_pair_context(
            config, batch.source_BS.shape[1], batch.tokens_BT.shape[1], batch.tokens_BT.device, axes,
            source_documents_BS=batch.source_documents_BS,
            documents_BT=batch.documents_BT,
            row_keys_B=derive_row_keys(batch.row_numbers_B, seed, step) if config.dropout else None,
            loss_factor=loss_factor,
        )
        return torch.cat((batch.source_BS, batch.tokens_BT), dim=1), context, batch.labels_BT

    return prepare
