"""Which keys each query sees, as dense masks and as tiles; which columns a cp rank holds; kernels of one tile."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from megascale.model import ring
from megascale.model.attention_core import attend
from megascale.model.attention_mask import FLEX_BLOCK, build_mask, cp_columns, dense_mask, flex_mask
from megascale.model.axes import ONE_RANK, Axes
from megascale.model.kernels import NOTHING_SEEN, can_train_flex, tile_backward, tile_forward
from megascale.parallel.axis import Axis

CPU = torch.device("cpu")


def documents_of(num_positions: int, *starts_of_rows: list[int]) -> torch.Tensor:
    """Document numbers of rows from the columns where documents after the first begin."""
    numbers_BT = torch.zeros(len(starts_of_rows), num_positions, dtype=torch.int64)
    for row, starts in enumerate(starts_of_rows):
        numbers_BT[row, starts] = 1
    return numbers_BT.cumsum(dim=1)


def cp_axes(size: int, rank: int, kind: str) -> Axes:
    return Axes(cp=Axis(size=size, rank=rank), context_attention=kind)


def sees(documents_BT, window, row: int, query: int, key: int) -> bool:
    """The rule, said for one query and key."""
    in_window = window is None or query - key < window
    return key <= query and in_window and (documents_BT is None or documents_BT[row, query] == documents_BT[row, key])


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("starts", [None, ([2, 3], [5])], ids=["one document", "documents"])
def test_the_dense_mask_says_what_the_rule_says(window, starts):
    documents_BT = documents_of(7, *starts) if starts else None
    mask = dense_mask(documents_BT, window, 7, CPU)
    rows = 2 if starts else 1
    assert mask.shape == (rows, 1, 7, 7)
    for row in range(rows):
        for query in range(7):
            for key in range(7):
                assert mask[row, 0, query, key] == sees(documents_BT, window, row, query, key), (row, query, key)


def test_plain_attention_makes_no_tensor():
    mask = build_mask(cp_columns(8, ONE_RANK, CPU), None, None, ONE_RANK, CPU)
    assert mask.is_plain
    assert mask.dense_B1TS is None
    assert mask.flex is None
    assert build_mask(cp_columns(8, ONE_RANK, CPU), None, 8, ONE_RANK, CPU).is_plain
    assert not build_mask(cp_columns(8, ONE_RANK, CPU), None, 7, ONE_RANK, CPU).is_plain


def test_a_mask_is_of_the_whole_row_with_ulysses_and_absent_with_a_ring():
    for kind, shape in (("ulysses", (1, 1, 8, 8)), ("ring", None)):
        axes = cp_axes(2, 1, kind)
        mask = build_mask(cp_columns(8, axes, CPU), None, 3, axes, CPU)
        assert (mask.dense_B1TS.shape if mask.dense_B1TS is not None else None) == shape


@pytest.mark.parametrize("size", [1, 2, 4])
def test_columns_of_all_ranks_are_the_row(size):
    for kind in ("ring", "ulysses"):
        columns = [cp_columns(16, cp_axes(size, rank, kind), CPU) for rank in range(size)]
        assert all(len(part) == 16 // size and bool((part.diff() > 0).all()) for part in columns)
        assert sorted(torch.cat(columns).tolist()) == list(range(16))


def test_columns_of_a_ring_are_balanced_and_those_of_ulysses_contiguous():
    assert cp_columns(8, cp_axes(2, 0, "ring"), CPU).tolist() == [0, 1, 6, 7]
    assert cp_columns(8, cp_axes(2, 1, "ring"), CPU).tolist() == [2, 3, 4, 5]
    assert cp_columns(8, cp_axes(2, 1, "ulysses"), CPU).tolist() == [4, 5, 6, 7]
    keys_seen = [(cp_columns(64, cp_axes(4, rank, "ring"), CPU) + 1).sum().item() for rank in range(4)]
    assert len(set(keys_seen)) == 1, "each rank's queries see as many keys"


@pytest.mark.parametrize("window", [None, 1, 100, 128, 129, 300])
@pytest.mark.parametrize("starts", [None, ([5, 128, 200], [383]), ([], [127, 129, 256])], ids=["one", "a", "b"])
@pytest.mark.parametrize("num_positions", [3 * FLEX_BLOCK, 3 * FLEX_BLOCK + 40])
def test_tiles_for_flex_attention_are_those_that_torch_finds(window, starts, num_positions):
    """torch looks at every query and key; ours only at the ends of tiles."""
    documents_BT = documents_of(num_positions, *starts) if starts else None
    found = flex_mask(documents_BT, window, num_positions, CPU)
    rows = 2 if starts else 1
    expected = create_block_mask(found.mask_mod, rows, None, num_positions, num_positions, device="cpu")
    for kind in ("", "full_"):
        assert torch.equal(getattr(found, f"{kind}kv_num_blocks"), getattr(expected, f"{kind}kv_num_blocks")), kind
        assert torch.equal(getattr(found, f"{kind}q_num_blocks"), getattr(expected, f"{kind}q_num_blocks")), kind
    assert torch.equal(found.to_dense(), expected.to_dense())
    q, k, v = torch.randn(3, rows, 2, num_positions, 16)
    seen = dense_mask(documents_BT, window, num_positions, CPU)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    assert torch.allclose(flex_attention(q, k, v, block_mask=found), dense, atol=1e-5)


def test_a_cpu_does_not_train_flex_attention():
    assert not can_train_flex(CPU)


@pytest.mark.parametrize("masked", [False, True])
def test_attend_matches_attention_written_out(masked):
    documents_BT, window = (documents_of(9, [4], [2, 7]), 3) if masked else (None, None)
    q, k, v = torch.randn(2, 9, 4, 8), torch.randn(2, 9, 2, 8), torch.randn(2, 9, 2, 8)
    mask = build_mask(cp_columns(9, ONE_RANK, CPU), documents_BT, window, ONE_RANK, CPU)
    scores = torch.einsum("btkgc,bskc->bkgts", q.unflatten(2, (2, 2)), k) * 8**-0.5
    weights = scores.masked_fill(~dense_mask(documents_BT, window, 9, CPU)[:, None], -torch.inf).softmax(dim=-1)
    expected = torch.einsum("bkgts,bskc->btkgc", weights, v).flatten(2, 3)
    assert torch.allclose(attend(q, k, v, mask, ONE_RANK), expected, atol=1e-6)


@pytest.mark.parametrize("is_causal", [False, True])
def test_plain_products_agree_with_the_flash_kernel(is_causal):
    q, k, v, grad = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 4, 6, 8)
    seen = torch.ones(1, 6, 6, dtype=torch.bool)
    seen = seen.tril() if is_causal else seen
    flash, plain = tile_forward(q, k, v, is_causal), tile_forward(q, k, v, seen_BTS=seen)
    for a, b in zip(flash, plain, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    gradients = (tile_backward(grad, q, k, v, *flash, is_causal), tile_backward(grad, q, k, v, *plain, seen_BTS=seen))
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_query_that_sees_no_key_of_a_tile_adds_nothing():
    q, k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    seen = torch.tensor([[[True, True, True], [False, False, False], [True, False, False]]])
    mixed, lse = tile_forward(q, k, v, seen_BTS=seen)
    assert not mixed[:, :, 1].any()
    assert bool((lse[:, :, 1] == NOTHING_SEEN).all())
    so_far, lse_so_far = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3)
    merged, lse_merged = so_far.clone(), lse_so_far.clone()
    ring.merge(merged, lse_merged, mixed, lse)
    assert torch.equal(merged[:, :, 1], so_far[:, :, 1])
    assert torch.equal(lse_merged[:, :, 1], lse_so_far[:, :, 1])
    for gradient in tile_backward(torch.ones_like(q), q, k, v, merged, lse_merged, seen_BTS=seen):
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("window", [None, 5, 20])
@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("tile", [3, 1024])
def test_the_tiles_of_a_ring_hold_each_visible_pair_once(size, window, has_documents, tile, monkeypatch):
    monkeypatch.setattr(ring, "TILE", tile)
    documents_BT = documents_of(48, [5, 24, 30], [11]) if has_documents else None
    counts = torch.zeros(2, 48, 48, dtype=torch.int64)
    for rank in range(size):
        columns = cp_columns(48, cp_axes(size, rank, "ring"), CPU)
        mask = build_mask(columns, documents_BT, window, cp_axes(size, rank, "ring"), CPU)
        for source in range(size):
            keys = cp_columns(48, cp_axes(size, source, "ring"), CPU)
            for part in ring.plan_tiles(rank, source, size, 48 // size, mask):
                q, k = columns[part.queries], keys[part.keys]
                seen = part.seen(mask)
                if seen is None:
                    seen = (q[:, None] >= k)[None] if part.is_causal else torch.ones(1, 1, 1, dtype=torch.bool)
                counts[:, q[:, None], k] += seen.expand(2, len(q), len(k)).long()
    assert torch.equal(counts, dense_mask(documents_BT, window, 48, CPU)[:, 0].expand(2, 48, 48).long())


def test_ranks_of_a_plain_ring_work_equally_in_every_step():
    def pairs(rank: int, source: int) -> int:
        axes = cp_axes(4, rank, "ring")
        mask = build_mask(cp_columns(64, axes, CPU), None, None, axes, CPU)
        tiles = ring.plan_tiles(rank, source, 4, 16, mask)
        return sum((part.queries.stop - part.queries.start) * (part.keys.stop - part.keys.start) for part in tiles)

    for step in range(4):
        assert {pairs(rank, (rank - step) % 4) for rank in range(4)} == {16 * 16 if step == 0 else 16 * 8}
