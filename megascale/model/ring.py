"""Ring attention: keys and values travel round the cp ranks while each attends to those it has at the moment.

A row lies over n ranks in 2n chunks, rank r with chunks r and 2n - 1 - r. In step i it has the keys and values of rank
s = r - i, and what its queries see of them is as much work in every step and on every rank:

| keys from     | queries that see some | keys that they see | mask   |
|---------------|-----------------------|--------------------|--------|
| s = r         | both chunks           | both chunks        | causal |
| s before r    | both chunks           | first chunk        | none   |
| s behind r    | second chunk          | both chunks        | none   |

Steps are merged by their log-sum-exp, in fp32. Without causal order all queries see all keys in every step.
Documents and windows are worked out tile by tile, where tiles that nobody sees are skipped and only those that some see
need a mask; a mask is made of document numbers and columns when its tile comes, so the memory stays linear in the
length of a row.

Cost: with x = 2 B T K C numbers of keys and values on a rank, each rank sends (n - 1) x forward, in the dtype of the
keys, and backward (n - 1) x of them again and (n - 1) x gradients in fp32. All of it but the last hop of the gradients
goes on during the work of a step.

The exchange is a side effect that torch.compile doesn't trace: a compiled block has a break in its graph here, and is
compiled before and after it.

Shapes: B rows, T positions on this rank, S keys of a tile, H query heads, K kv heads, C head_dim. A leading 2 is the
pair of keys and values.
Source: Liu et al. 2023 (Ring Attention), section 3; merging: Dao 2023 (FlashAttention-2), section 3.1.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

from megascale.model.attention_mask import AttentionMask, visible
from megascale.model.kernels import NOTHING_SEEN, tile_backward, tile_forward
from megascale.parallel.axis import Axis

TILE = 1024
"""Queries and keys of a tile with a mask, at most: bounds the scores that plain products hold."""


class Tile(NamedTuple):
    """A part of one step's work: which of this rank's queries, which of the visiting keys.

    Attributes:
        queries, keys: positions on this rank and on the rank that the keys are from.
        is_causal: query i sees keys 0 to i.
        is_masked: some queries see some of the keys; `seen` has which.
        query_column, key_column: columns in the row of the first of each, where it is masked.
    """

    queries: slice
    keys: slice
    is_causal: bool = False
    is_masked: bool = False
    query_column: int = 0
    key_column: int = 0

    def seen(self, mask: AttentionMask) -> torch.Tensor | None:
        """Which queries see which keys, None where `is_causal` says all. Shape: (B, T, S) bool."""
        if not self.is_masked:
            return None
        columns_T, columns_S = (
            torch.arange(first, first + part.stop - part.start, device=mask.columns_T.device)
            for first, part in ((self.query_column, self.queries), (self.key_column, self.keys))
        )
        documents_BT = documents_BS = None
        if mask.documents_BT is not None:
            documents_BT = mask.documents_BT[:, self.query_column : self.query_column + len(columns_T)]
            documents_BS = mask.documents_BT[:, self.key_column : self.key_column + len(columns_S)]
        return visible(columns_T, columns_S, documents_BT, documents_BS, mask.window, is_causal=mask.is_causal)


def plan_tiles(rank: int, source: int, num_ranks: int, num_positions: int, mask: AttentionMask) -> Iterator[Tile]:
    """The work of the queries of `rank` on the keys of `source`, each with `num_positions` positions."""
    half, whole = num_positions // 2, slice(0, num_positions)
    if not mask.is_plain:
        for query_half, query_chunk in enumerate((rank, 2 * num_ranks - 1 - rank)):
            for key_half, key_chunk in enumerate((source, 2 * num_ranks - 1 - source)):
                if key_chunk <= query_chunk or not mask.is_causal:
                    yield from _masked_tiles(query_half * half, key_half * half, query_chunk * half, key_chunk * half,
                                             half, mask)
    elif not mask.is_causal:
        yield Tile(whole, whole)
    elif source == rank:
        yield Tile(whole, whole, is_causal=True)
    elif source < rank:
        yield Tile(whole, slice(0, half))
    else:
        yield Tile(slice(half, num_positions), whole)


def _masked_tiles(
    query_at: int, key_at: int, query_column: int, key_column: int, length: int, mask: AttentionMask
) -> Iterator[Tile]:
    """A chunk of queries against a chunk of keys, in tiles: without those that nobody sees."""
    for q in range(0, length, TILE):
        for k in range(0, length, TILE):
            num_queries, num_keys = min(TILE, length - q), min(TILE, length - k)
            offset = query_column + q - key_column - k
            nearest, furthest = offset - num_keys + 1, offset + num_queries - 1
            if (furthest < 0 and mask.is_causal) or (mask.window is not None and nearest >= mask.window):
                continue
            cuts_window = mask.window is not None and furthest >= mask.window
            is_masked = mask.documents_BT is not None or cuts_window
            yield Tile(
                slice(query_at + q, query_at + q + num_queries), slice(key_at + k, key_at + k + num_keys),
                is_causal=mask.is_causal and offset == 0 and not is_masked, is_masked=is_masked,
                query_column=query_column + q, key_column=key_column + k,
            )


def start_hop(tensor: torch.Tensor, cp: Axis) -> Callable[[], torch.Tensor]:
    """Starts to send a tensor to the next rank; the result waits for the one from the rank before."""
    arriving = torch.empty_like(tensor)
    works = dist.batch_isend_irecv([
        dist.P2POp(dist.isend, tensor, group=cp.group, group_peer=(cp.rank + 1) % cp.size),
        dist.P2POp(dist.irecv, arriving, group=cp.group, group_peer=(cp.rank - 1) % cp.size),
    ])
    return partial(_finish_hop, works, tensor, arriving)


def _finish_hop(works: list[dist.Work], _leaving: torch.Tensor, arriving: torch.Tensor) -> torch.Tensor:
    """Waits. The leaving tensor is an argument so that its memory isn't used again before it has left."""
    for work in works:
        work.wait()
    return arriving


def visits(kv_2BKTC: torch.Tensor, cp: Axis) -> Iterator[tuple[int, torch.Tensor]]:
    """(rank that they are from, keys and values) of every step, the next ones on their way meanwhile."""
    for step in range(cp.size):
        finish = start_hop(kv_2BKTC, cp) if step < cp.size - 1 else None
        yield (cp.rank - step) % cp.size, kv_2BKTC
        if finish:
            kv_2BKTC = finish()


class RingAttention(torch.autograd.Function):
    """Attention over a row that lies over the ranks of an axis; see the top of the file."""

    @staticmethod
    def forward(ctx, q_BHTC, k_BKTC, v_BKTC, mask: AttentionMask, cp: Axis, softcap: float | None) -> torch.Tensor:
        num_positions = q_BHTC.shape[2]
        mixed_BHTC = torch.zeros_like(q_BHTC, dtype=torch.float32)
        lse_BHT = torch.full(q_BHTC.shape[:3], NOTHING_SEEN, dtype=torch.float32, device=q_BHTC.device)
        for source, (k, v) in visits(torch.stack((k_BKTC, v_BKTC)), cp):
            for tile in plan_tiles(cp.rank, source, cp.size, num_positions, mask):
                of_tile = tile_forward(
                    q_BHTC[:, :, tile.queries], k[:, :, tile.keys], v[:, :, tile.keys], tile.is_causal, tile.seen(mask),
                    softcap,
                )
                merge(mixed_BHTC[:, :, tile.queries], lse_BHT[:, :, tile.queries], *of_tile)
        mixed_BHTC = mixed_BHTC.to(q_BHTC.dtype)
        ctx.save_for_backward(q_BHTC, k_BKTC, v_BKTC, mixed_BHTC, lse_BHT)
        ctx.mask, ctx.cp, ctx.softcap = mask, cp, softcap
        return mixed_BHTC

    @staticmethod
    def backward(ctx, grad_BHTC: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_BHTC, k_BKTC, v_BKTC, mixed_BHTC, lse_BHT = ctx.saved_tensors
        mask, cp = ctx.mask, ctx.cp
        grad_q_BHTC = torch.zeros_like(q_BHTC, dtype=torch.float32)
        own_grad_2BKTC, finish = None, None
        for source, kv_2BKTC in visits(torch.stack((k_BKTC, v_BKTC)), cp):
            grad_2BKTC = torch.zeros_like(kv_2BKTC, dtype=torch.float32)
            for tile in plan_tiles(cp.rank, source, cp.size, q_BHTC.shape[2], mask):
                rows, keys = tile.queries, tile.keys
                grad_q, grad_k, grad_v = tile_backward(
                    grad_BHTC[:, :, rows], q_BHTC[:, :, rows], *kv_2BKTC[:, :, :, keys], mixed_BHTC[:, :, rows],
                    lse_BHT[:, :, rows], tile.is_causal, tile.seen(mask), ctx.softcap,
                )
                grad_q_BHTC[:, :, rows] += grad_q
                grad_2BKTC[0, :, :, keys] += grad_k
                grad_2BKTC[1, :, :, keys] += grad_v
            if own_grad_2BKTC is None:
                own_grad_2BKTC = grad_2BKTC
                continue
            # The gradients follow their keys, one step behind them; after the last rank they are sent home.
            if finish:
                grad_2BKTC += finish()
            finish = start_hop(grad_2BKTC, cp)
        own_grad_2BKTC += finish()
        return grad_q_BHTC.to(q_BHTC.dtype), *own_grad_2BKTC.to(k_BKTC.dtype), None, None, None


def merge(mixed_BHTC: torch.Tensor, lse_BHT: torch.Tensor, tile_BHTC: torch.Tensor, tile_lse_BHT: torch.Tensor) -> None:
    """Adds the result over further keys to that over the keys so far, in place."""
    merged_BHT = torch.logaddexp(lse_BHT, tile_lse_BHT)
    mixed_BHTC.mul_((lse_BHT - merged_BHT).exp_()[..., None])
    mixed_BHTC.add_(tile_BHTC * (tile_lse_BHT - merged_BHT).exp_()[..., None])
    lse_BHT.copy_(merged_BHT)


@torch.compiler.disable
def ring_attend(
    q_BTHC: torch.Tensor, k_BTKC: torch.Tensor, v_BTKC: torch.Tensor, mask: AttentionMask, cp: Axis,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention of this rank's queries over the whole row.

    Shape: (B, T, H, C), (B, T, K, C) twice, to (B, T, H, C).
    """
    heads = (part.transpose(1, 2) for part in (q_BTHC, k_BTKC, v_BTKC))
    return RingAttention.apply(*heads, mask, cp, softcap).transpose(1, 2)
