"""What a micro-batch is trained on: the next token."""

import torch

from megascale.config.model import ModelConfig
from megascale.engine.base import Objective
from megascale.model.context import build_context
from megascale.model.dropout import derive_row_keys
from megascale.model.loss import token_loss


def causal_objective(config: ModelConfig, seed: int) -> Objective:
    """Sum of the negative log-likelihoods of the labels, with dropout keyed by (seed, step, row)."""

    def objective(module: torch.nn.Module, batch, step: int) -> torch.Tensor:
        row_keys_B = derive_row_keys(batch.row_numbers_B, seed, step) if config.dropout else None
        context = build_context(
            config, batch.tokens_BT.shape[1], batch.tokens_BT.device, row_keys_B=row_keys_B
        )
        nll_sum, _ = token_loss(module(batch.tokens_BT, context), batch.labels_BT)
        return nll_sum

    return objective
