"""What a micro-batch is trained on: inputs, context and labels of this rank's positions."""

from megascale.config.model import ModelConfig
from megascale.config.schema import RunConfig
from megascale.engine.base import Objective
from megascale.model.axes import Axes
from megascale.model.context import build_context
from megascale.model.dropout import derive_row_keys


def run_objective(config: RunConfig, axes: Axes) -> Objective:
    """The objective of a run."""
    return token_objective(config.model, config.run.seed, axes, config.data.document_mask)


def token_objective(config: ModelConfig, seed: int, axes: Axes, has_document_mask: bool) -> Objective:
    """One stack over tokens: a label for each position, or for some. Dropout is keyed by (seed, step, row).

    Args:
        has_document_mask: whether attention stays within documents; if not, a row is one.
    """

    def prepare(batch, step: int, loss_factor) -> tuple:
        num_positions = batch.tokens_BT.shape[1]
        context = build_context(
            config, num_positions, batch.tokens_BT.device, axes,
            documents_BT=batch.documents_BT if has_document_mask else None,
            row_keys_B=derive_row_keys(batch.row_numbers_B, seed, step) if config.dropout else None,
            loss_factor=loss_factor,
        )
        if axes.cp.size == 1:
            return batch.tokens_BT, context, batch.labels_BT
        columns_A = context.mask.columns_T
        return batch.tokens_BT[:, columns_A], context, batch.labels_BT[:, columns_A]

    return prepare
