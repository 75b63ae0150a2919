"""Which keys each query sees: causal order or both ways, documents packed into one row, a sliding window.

A query at column t of the row sees the keys at columns t - window + 1 to t of its own document. Built once per
micro-batch and shared by all layers; every rank knows the documents of the whole row, so nothing is sent.
Shapes: B rows, T positions of attention on this rank or of the whole row, S positions of keys.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask

from megascale.model.axes import Axes
from megascale.model.kernels import can_train_flex

FLEX_BLOCK = 128
"""Queries and keys of one tile of FlexAttention: its default, and what its kernels are tuned for."""


class AttentionMask(NamedTuple):
    """What attention needs beside queries, keys and values. At most one of `dense_B1TS` and `flex` is there.

    Attributes:
        columns_T: int64, column in the row of each attention position on this rank.
        documents_BT: int64, document of each position of the whole row, never falling along it; None: the row is one.
        window: keys that a query sees at most, itself included; None: all before it.
        dense_B1TS: bool over the whole row, True where the query sees the key. None: plain causal, FlexAttention, or
            ring attention, which makes the mask of one tile at a time and never holds the square of a row.
        flex: the same as tiles for FlexAttention.
        is_causal: whether a query sees no key behind its own position.
    """

    columns_T: torch.Tensor
    documents_BT: torch.Tensor | None
    window: int | None
    dense_B1TS: torch.Tensor | None
    flex: BlockMask | None
    is_causal: bool = True

    @property
    def is_plain(self) -> bool:
        """Whether a query sees all keys up to its own, or of a whole row all keys."""
        return self.documents_BT is None and self.window is None


def cp_columns(num_positions: int, axes: Axes, device: torch.device) -> torch.Tensor:
    """The columns of a row that this cp rank holds, rising.

    Ulysses: the rank-th of n equal parts. Ring: chunks r and 2n - 1 - r of 2n, since a late query sees more keys than
    an early one: such a pair has the same work on each rank.

    Shape: (T,) int64, made on the device: a copy from the CPU would wait for it.
    Source: the pairing of chunks is that of Llama 3's training (Dubey et al. 2024, section 3.3.2).
    """
    columns_T, cp = torch.arange(num_positions, device=device), axes.cp
    if cp.size == 1 or axes.context_attention == "ulysses":
        return columns_T.chunk(cp.size)[cp.rank]
    chunks = columns_T.chunk(2 * cp.size)
    return torch.cat((chunks[cp.rank], chunks[-1 - cp.rank]))


def build_mask(
    columns_T: torch.Tensor, documents_BT: torch.Tensor | None, window: int | None, axes: Axes, device: torch.device,
    *, is_causal: bool = True, is_bent: bool = False,
) -> AttentionMask:
    """The mask of a micro-batch in the form that its attention wants.

    Args:
        columns_T: from `cp_columns`.
        documents_BT: of the whole row, numbers that never fall along it. None: no documents.
        is_bent: whether scores are bent, which FlexAttention alone does in a kernel: then it gets its tiles even where
            the mask is plain.

    Cost: nothing for plain causal attention and for the ring; else B T^2 bytes, or with FlexAttention B (T / 128)^2
    numbers.
    """
    num_positions = len(columns_T) * axes.cp.size
    if window is not None and window >= num_positions:
        window = None
    mask = AttentionMask(columns_T, documents_BT, window, None, None, is_causal)
    is_tiled = is_bent and can_train_flex(device)
    if (mask.is_plain and not is_tiled) or (axes.cp.size > 1 and axes.context_attention == "ring"):
        return mask
    if can_train_flex(device):
        return mask._replace(flex=flex_mask(documents_BT, window, num_positions, device, is_causal=is_causal))
    return mask._replace(dense_B1TS=dense_mask(documents_BT, window, num_positions, device, is_causal=is_causal))


def dense_mask(
    documents_BT: torch.Tensor | None, window: int | None, num_positions: int, device: torch.device,
    *, is_causal: bool = True,
) -> torch.Tensor:
    """Shape: (B, 1, T, T) bool, or (1, 1, T, T) without documents."""
    columns_T = torch.arange(num_positions, device=device)
    return visible(columns_T, columns_T, documents_BT, documents_BT, window, is_causal=is_causal)[:, None]


def visible(
    query_columns_T: torch.Tensor,
    key_columns_S: torch.Tensor,
    query_documents_BT: torch.Tensor | None,
    key_documents_BS: torch.Tensor | None,
    window: int | None,
    *,
    is_causal: bool = True,
) -> torch.Tensor:
    """Whether each query sees each key. Shape: (B, T, S) bool, or (1, T, S) without documents."""
    distance_TS = query_columns_T[:, None] - key_columns_S
    seen_BTS = (distance_TS >= 0)[None] if is_causal else torch.ones_like(distance_TS, dtype=torch.bool)[None]
    if window is not None:
        seen_BTS = seen_BTS & (distance_TS < window)
    if query_documents_BT is not None and key_documents_BS is not None:
        seen_BTS = seen_BTS & (query_documents_BT[:, :, None] == key_documents_BS[:, None])
    return seen_BTS


def flex_mask(
    documents_BT: torch.Tensor | None, window: int | None, num_positions: int, device: torch.device,
    *, is_causal: bool = True,
) -> BlockMask:
    """The mask as tiles: those with nothing to see are skipped, those with all to see need no mask.

    Worked out from the ends of each tile, since documents never fall along a row: the square of a row is never held.
    """
    first_N = torch.arange(0, num_positions, FLEX_BLOCK, device=device)
    last_N = (first_N + FLEX_BLOCK - 1).clamp(max=num_positions - 1)
    is_before_NM = first_N[:, None] > first_N
    if not is_causal:
        is_before_NM = torch.ones_like(is_before_NM)
    some_BNM = (is_before_NM | (first_N[:, None] == first_N))[None]
    # A tile cut short by the row's end keeps its mask, which says where the end is.
    is_whole_N = first_N + FLEX_BLOCK <= num_positions
    all_BNM = (is_before_NM & is_whole_N[:, None] & (is_causal | is_whole_N))[None]
    if window is not None:
        some_BNM = some_BNM & (first_N[:, None] - last_N < window)
        all_BNM = all_BNM & (last_N[:, None] - first_N < window)
    if documents_BT is not None:
        start_BN, end_BN = documents_BT[:, first_N], documents_BT[:, last_N]
        some_BNM = some_BNM & (start_BN[:, :, None] <= end_BN[:, None])
        if not is_causal:
            some_BNM = some_BNM & (end_BN[:, :, None] >= start_BN[:, None])
        all_BNM = all_BNM & (end_BN[:, :, None] == start_BN[:, None])
        if not is_causal:
            all_BNM = all_BNM & (start_BN[:, :, None] == end_BN[:, None])
    return BlockMask.from_kv_blocks(
        *_listed(some_BNM & ~all_BNM), *_listed(some_BNM & all_BNM), BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=_mask_rule(documents_BT, window, is_causal), seq_lengths=(num_positions, num_positions),
    )


def _listed(chosen_BNM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many tiles are chosen for each row of tiles, and their numbers with the chosen ones first."""
    chosen_B1NM = chosen_BNM[:, None].int()
    order_B1NM = chosen_B1NM.argsort(dim=-1, descending=True, stable=True)
    return chosen_B1NM.sum(dim=-1, dtype=torch.int32), order_B1NM.int().contiguous()


def _mask_rule(documents_BT: torch.Tensor | None, window: int | None, is_causal: bool) -> Callable:
    """The rule of `visible` for one query and key, as FlexAttention compiles it into its kernel."""

    def sees(row, _head, query, key):
        seen = query >= key if is_causal else query == query
        if window is not None:
            seen = seen & (query - key < window)
        if documents_BT is not None:
            seen = seen & (documents_BT[row, query] == documents_BT[row, key])
        return seen

    return sees
