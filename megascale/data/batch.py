"""What the data path hands to the training loop."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True)
class Batch:
    """Rows that go through the model together.

    Legend: B rows, T positions.

    Attributes:
        tokens_BT: inputs, int64.
        labels_BT: the token after each input, int64; -100 where there is none (padding).
        documents_BT: number of the document of each position, int32, never falling along a row; padding is a document
            of its own.
        row_numbers_B: the global number of each row, int64; -1 for a row that only fills a batch and has no labels.
        source_BS: inputs of an encoder whose output the decoder reads, int64; None where there is none.
        source_documents_BS: their documents, likewise.
        segments_BT: kind of segment of each token, int64; None where there are none.
        images_BCHW: images, fp32, normalised; None for text.
    """

    tokens_BT: torch.Tensor
    labels_BT: torch.Tensor
    documents_BT: torch.Tensor
    row_numbers_B: torch.Tensor
    source_BS: torch.Tensor | None = None
    source_documents_BS: torch.Tensor | None = None
    segments_BT: torch.Tensor | None = None
    images_BCHW: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in memory that a GPU copies from without waiting."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        values = (getattr(self, field.name) for field in fields(self))
        return Batch(*(None if value is None else change(value) for value in values))


def cumulative_lengths(documents_BT: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Where documents begin in the rows laid end to end, as attention kernels for sequences of any length want it.

    Returns:
        (cu_seqlens, max_seqlen): int32, from 0 to B T, one more than documents; and the longest document's length.
    """
    begins_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    begins_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    starts = begins_BT.flatten().nonzero().flatten()
    bounds = torch.cat((starts, starts.new_tensor([documents_BT.numel()])))
    return bounds.int(), int(bounds.diff().max())
