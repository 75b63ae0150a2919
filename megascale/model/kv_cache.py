"""Keys and values of earlier positions, kept so that generation runs each position through the model once.

Rows of different lengths stand side by side, padded on the right: position t of a row is slot t of its memory, whatever
the other rows do. What a padded position left there is never seen, and overwritten by the row's own token.

Shapes: B rows, T new positions, S slots, K kv heads of this rank, C head_dim.
"""

from collections.abc import Callable

import torch

from megascale.config.model import ModelConfig
from megascale.model.attention_mask import AttentionMask
from megascale.model.axes import Axes
from megascale.model.context import Context, build_context, rotary_of


class KvCache:
    """The keys and values of some rows, by attention layer; each rank has those of its layers and heads.

    Its memory is asked for once, when a layer first writes; a step copies its own position into it and nothing else.

    Args:
        num_rows: rows.
        capacity: positions that a row may come to have.

    Memory: 2 B S K C numbers for each layer, in the dtype of its keys.
    """

    def __init__(self, num_rows: int, capacity: int):
        self.num_rows, self.capacity = num_rows, capacity
        self._held: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._fixed: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._rows_B1: torch.Tensor | None = None
        self._slots_BT: torch.Tensor | None = None
        self._end = 0

    def expect(self, slots_BT: torch.Tensor | None, end: int) -> None:
        """Says where the next positions go.

        Args:
            slots_BT: int64 on the layers' device; None for the first positions of all rows, from 0 on.
            end: one more than the highest slot that any row has filled by then.
        """
        self._slots_BT, self._end = slots_BT, end
        if slots_BT is not None:
            self._rows_B1 = torch.arange(len(slots_BT), device=slots_BT.device)[:, None]

    def extend(self, name: str, k_BTKC: torch.Tensor, v_BTKC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes the new keys and values of a layer; gives all that it has up to `end`, as views of its memory.

        Shape: (B, T, K, C) twice to (B, S, K, C) twice.
        """
        if name not in self._held:
            shape = (self.num_rows, self.capacity, *k_BTKC.shape[2:])
            self._held[name] = k_BTKC.new_zeros(shape), v_BTKC.new_zeros(shape)
        for held, new in zip(self._held[name], (k_BTKC, v_BTKC), strict=True):
            if self._slots_BT is None:
                held[:, : new.shape[1]] = new
            else:
                held[self._rows_B1, self._slots_BT] = new
        k_BSKC, v_BSKC = self._held[name]
        return k_BSKC[:, : self._end], v_BSKC[:, : self._end]

    def fixed(
        self, name: str, make: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values that no step changes, such as those of an encoder's output: made once, then given again."""
        if name not in self._fixed:
            self._fixed[name] = make()
        return self._fixed[name]

    def reorder(self, sources: list[int]) -> None:
        """Row i goes on from what row `sources[i]` had, as beam search wants. Fixed ones stay: rows share a source.

        Cost: copies the filled slots of the rows that change.
        """
        moved = [row for row, source in enumerate(sources) if row != source]
        if not moved:
            return
        for held in (tensor for pair in self._held.values() for tensor in pair):
            held[moved, : self._end] = held[[sources[row] for row in moved], : self._end]


class NoCache:
    """Keeps nothing: rows are run anew for each token. It tells layers that they generate."""

    def expect(self, slots_BT: torch.Tensor | None, end: int) -> None:
        """See `KvCache`."""

    def extend(self, name: str, k_BTKC: torch.Tensor, v_BTKC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `KvCache`."""
        return k_BTKC, v_BTKC

    def fixed(
        self, name: str, make: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `KvCache`."""
        return make()

    def reorder(self, sources: list[int]) -> None:
        """See `KvCache`."""


def first_context(
    config: ModelConfig, num_positions: int, device: torch.device, axes: Axes, cache: KvCache | NoCache
) -> Context:
    """The context of the first positions of all rows, which `cache` is to keep."""
    cache.expect(None, num_positions)
    return build_context(config, num_positions, device, axes)._replace(cache=cache)


def next_context(config: ModelConfig, columns_BT: torch.Tensor, end: int, cache: KvCache) -> Context:
    """The context of new positions of each row, behind those that `cache` has.

    Args:
        columns_BT: int64, position of each new token in its row.
        end: one more than the highest of them over all rows.
    """
    cache.expect(columns_BT, end)
    cos_BT1C, sin_BT1C = rotary_of(config, columns_BT)
    return Context(
        columns_BT, columns_BT[0], cos_BT1C, sin_BT1C, None, seen_so_far(columns_BT, end, config.window),
        global_mask=seen_so_far(columns_BT, end, None) if config.global_every else None, cache=cache,
    )


def seen_so_far(columns_BT: torch.Tensor, end: int, window: int | None) -> AttentionMask:
    """The mask of new positions of each row over all that it has: its own and those before."""
    distance_BTS = columns_BT[:, :, None] - torch.arange(end, device=columns_BT.device)
    seen_BTS = distance_BTS >= 0
    if window is not None:
        seen_BTS &= distance_BTS < window
    return AttentionMask(columns_BT[0], None, window, seen_BTS[:, None], None)
