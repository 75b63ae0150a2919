"""What a micro-batch is trained on: the next token."""

from megascale.config.model import ModelConfig
from megascale.engine.base import Objective
from megascale.model.axes import Axes
from megascale.model.context import build_context, number_documents
from megascale.model.dropout import derive_row_keys


def causal_objective(config: ModelConfig, seed: int, axes: Axes, document_end: int | None) -> Objective:
    """Tokens, context and labels of this rank's positions, with dropout keyed by (seed, step, row).

    Args:
        document_end: the token that ends a document, for attention that stays within documents; None: a row is one.
    """

    def prepare(batch, step: int) -> tuple:
        num_positions = batch.tokens_BT.shape[1]
        context = build_context(
            config, num_positions, batch.tokens_BT.device, axes,
            documents_BT=None if document_end is None else number_documents(batch.tokens_BT, document_end),
            row_keys_B=derive_row_keys(batch.row_numbers_B, seed, step) if config.dropout else None,
        )
        if axes.cp.size == 1:
            return batch.tokens_BT, context, batch.labels_BT
        columns_A = context.mask.columns_T
        return batch.tokens_BT[:, columns_A], context, batch.labels_BT[:, columns_A]

    return prepare
