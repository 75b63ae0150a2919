"""What a micro-batch is trained on: the next token."""

from megascale.config.model import ModelConfig
from megascale.engine.base import Objective
from megascale.model.axes import Axes
from megascale.model.context import build_context
from megascale.model.dropout import derive_row_keys


def causal_objective(config: ModelConfig, seed: int, axes: Axes, has_document_mask: bool) -> Objective:
    """Tokens, context and labels of this rank's positions, with dropout keyed by (seed, step, row).

    Args:
        has_document_mask: whether attention stays within documents; if not, a row is one.
    """

    def prepare(batch, step: int) -> tuple:
        num_positions = batch.tokens_BT.shape[1]
        context = build_context(
            config, num_positions, batch.tokens_BT.device, axes,
            documents_BT=batch.documents_BT if has_document_mask else None,
            row_keys_B=derive_row_keys(batch.row_numbers_B, seed, step) if config.dropout else None,
        )
        if axes.cp.size == 1:
            return batch.tokens_BT, context, batch.labels_BT
        columns_A = context.mask.columns_T
        return batch.tokens_BT[:, columns_A], context, batch.labels_BT[:, columns_A]

    return prepare
