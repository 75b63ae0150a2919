"""Attention kernels on a CUDA device: FlexAttention with its tiles, and the tiles of the ring.

Ring attention needs a GPU per rank; here one GPU does the tiles of all ranks in turn, without the messages.
"""

import pytest
import torch
import torch.nn.functional as F

from megascale.model import ring
from megascale.model.attention_core import attend
from megascale.model.attention_mask import build_mask, cp_columns, dense_mask
from megascale.model.axes import ONE_RANK, Axes
from megascale.model.kernels import NOTHING_SEEN, tile_backward, tile_forward
from megascale.parallel.axis import Axis

pytestmark = [
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

POSITIONS, HEADS, KV_HEADS, HEAD_DIM = 512, 4, 2, 64
WINDOW = 200
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Relative to the largest number."""
MASKS = ("plain", "documents", "window", "both")


def make_mask_inputs(kind: str) -> tuple[torch.Tensor | None, int | None]:
    documents_BT = torch.zeros(2, POSITIONS, dtype=torch.int64, device="cuda")
    documents_BT[0, [3, 128, 300]] = 1
    documents_BT[1, [255]] = 1
    has_documents, has_window = kind in ("documents", "both"), kind in ("window", "both")
    return documents_BT.cumsum(dim=1) if has_documents else None, WINDOW if has_window else None


def make_heads(dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v and the gradient of the result. Shape: (B, T, heads, C)."""
    torch.manual_seed(0)
    counts = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return [torch.randn(2, POSITIONS, count, HEAD_DIM, device="cuda").to(dtype) for count in counts]


def expected_of(q, k, v, grad, documents_BT, window) -> list[torch.Tensor]:
    """Dense attention in fp64: result, and gradients of q, k and v."""
    exact = [part.double().detach().requires_grad_() for part in (q, k, v)]
    seen = dense_mask(documents_BT, window, POSITIONS, q.device)
    repeated = (part.repeat_interleave(HEADS // part.shape[2], dim=2).transpose(1, 2) for part in exact)
    mixed = F.scaled_dot_product_attention(*repeated, attn_mask=seen).transpose(1, 2)
    mixed.backward(grad.double())
    return [mixed, *(part.grad for part in exact)]


def assert_near(expected: list[torch.Tensor], found: list[torch.Tensor], tolerance: float) -> None:
    for a, b in zip(expected, found, strict=True):
        assert ((a - b.double()).abs().max() / a.abs().max()).item() <= tolerance


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_whole_rows(kind, dtype, is_compiled):
    documents_BT, window = make_mask_inputs(kind)
    device = torch.device("cuda", 0)
    mask = build_mask(cp_columns(POSITIONS, ONE_RANK, device), documents_BT, window, ONE_RANK, device)
    assert (mask.flex is not None) == (kind != "plain")
    q, k, v, grad = make_heads(dtype)
    heads = [part.requires_grad_() for part in (q, k, v)]
    mixed = (torch.compile(attend) if is_compiled else attend)(*heads, mask, ONE_RANK)
    mixed.backward(grad)
    found = [mixed, *(part.grad for part in heads)]
    assert_near(expected_of(q, k, v, grad, documents_BT, window), found, TOLERANCE[dtype])


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_tiles_of_a_ring(kind, dtype, num_ranks):
    documents_BT, window = make_mask_inputs(kind)
    q, k, v, grad = make_heads(dtype)
    by_head = [part.transpose(1, 2) for part in (q, k, v, grad)]
    # The result, then the gradients of q, k and v.
    found = [torch.zeros_like(by_head[i], dtype=torch.float32) for i in (0, 0, 1, 2)]
    lse = torch.full(by_head[0].shape[:3], NOTHING_SEEN, device="cuda")
    axes = [Axes(cp=Axis(size=num_ranks, rank=rank)) for rank in range(num_ranks)]
    columns = [cp_columns(POSITIONS, axis, torch.device("cuda")) for axis in axes]

    def tiles(rank: int):
        mask = build_mask(columns[rank], documents_BT, window, axes[rank], q.device)
        for source in range(num_ranks):
            for tile in ring.plan_tiles(rank, source, num_ranks, POSITIONS // num_ranks, mask):
                yield columns[rank][tile.queries], columns[source][tile.keys], tile.is_causal, tile.seen(mask)

    for rank in range(num_ranks):
        for rows, keys, is_causal, seen in tiles(rank):
            mixed_part, lse_part = found[0][:, :, rows], lse[:, :, rows]
            of_tile = tile_forward(*(part[:, :, at] for part, at in zip(by_head, (rows, keys, keys), strict=False)),
                                   is_causal, seen)
            ring.merge(mixed_part, lse_part, *of_tile)
            found[0][:, :, rows], lse[:, :, rows] = mixed_part, lse_part
    mixed = found[0].to(dtype)
    for rank in range(num_ranks):
        for rows, keys, is_causal, seen in tiles(rank):
            inputs = (by_head[3][:, :, rows], by_head[0][:, :, rows], by_head[1][:, :, keys], by_head[2][:, :, keys])
            parts = tile_backward(*inputs, mixed[:, :, rows], lse[:, :, rows], is_causal, seen)
            for gradient, at, part in zip(found[1:], (rows, keys, keys), parts, strict=True):
                gradient[:, :, at] += part
    expected = [part.transpose(1, 2) for part in expected_of(q, k, v, grad, documents_BT, window)]
    assert_near(expected, found, TOLERANCE[dtype])
