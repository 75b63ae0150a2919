"""What the data path hands to the training loop."""

from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True)
class Batch:
    """Rows that go through the model together.

    Legend: B rows, T positions.

    Attributes:
        tokens_BT: inputs, int64.
        labels_BT: the token after each input, int64; -100 where there is none (padding).
        row_numbers_B: the global number of each row, int64; -1 for a row that only fills a batch and has no labels.
    """

    tokens_BT: torch.Tensor
    labels_BT: torch.Tensor
    row_numbers_B: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        return Batch(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))
