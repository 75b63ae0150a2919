"""Runs one rank of context parallel attention: each case against dense attention over the whole rows.

Arguments: a JSON list of cases {kind, kv_heads, mask, dtype, mode, tile (if wanted), scale (if wanted)}. Rank 0 prints
one JSON result a case: the case, `gap`, the largest difference over all ranks of the result and of the gradients of q,
k and v, relative to the largest number of each, and `sent`, the numbers in this rank's messages to one other rank.
"""

import json
import os
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megascale.model import ring
from megascale.model.attention_core import attend
from megascale.model.attention_mask import build_mask, cp_columns
from megascale.model.axes import Axes
from megascale.parallel.axis import axis_of_group
from megascale.parallel.mesh import close_mesh, join_ranks, read_rank_info

ROWS, POSITIONS, HEADS, HEAD_DIM = 2, 48, 4, 8
WINDOW = 14
DOCUMENT_STARTS = ((0, 5, 6, 29), (0, 13, 24, 47))
"""Documents of one token, over chunk bounds, and that begin on one."""


def documents() -> torch.Tensor:
    """Shape: (B, T) int64."""
    numbers_BT = torch.zeros(ROWS, POSITIONS, dtype=torch.int64)
    for row, starts in enumerate(DOCUMENT_STARTS):
        numbers_BT[row, list(starts[1:])] = 1
    return numbers_BT.cumsum(dim=1)


def dense_attention(q_BTHC, k_BTKC, v_BTKC, documents_BT, window) -> torch.Tensor:
    """Softmax attention written out, in fp64."""
    repeats = q_BTHC.shape[2] // k_BTKC.shape[2]
    k_BTHC, v_BTHC = (heads.repeat_interleave(repeats, dim=2) for heads in (k_BTKC, v_BTKC))
    scores_BHTS = torch.einsum("bthc,bshc->bhts", q_BTHC, k_BTHC) * HEAD_DIM**-0.5
    t, s = torch.arange(POSITIONS)[:, None], torch.arange(POSITIONS)
    seen = (s <= t)[None, None]
    if window is not None:
        seen = seen & (t - s < window)
    if documents_BT is not None:
        seen = seen & (documents_BT[:, None, :, None] == documents_BT[:, None, None, :])
    weights_BHTS = scores_BHTS.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    return torch.einsum("bhts,bshc->bthc", weights_BHTS, v_BTHC)


class SentNumbers(TorchDispatchMode):
    """Counts the numbers in every message that this rank sends to one other."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.c10d.send.default:
            self.total += sum(tensor.numel() for tensor in args[0])
        return func(*args, **(kwargs or {}))


def run_attention(mode: str, heads, mask, axes: Axes) -> torch.Tensor:
    """`attend` as a block runs it: plainly, computed again in backward, or compiled."""
    if mode == "recompute":
        return checkpoint(attend, *heads, mask, axes, use_reentrant=False)
    if mode == "compile":
        return torch.compile(attend, backend="aot_eager")(*heads, mask, axes)
    return attend(*heads, mask, axes)


def measure(case: dict, world: Axes) -> dict:
    """The case's gap on this rank."""
    axes = Axes(cp=world.cp, context_attention=case["kind"])
    documents_BT = documents() if case["mask"] in ("documents", "both") else None
    window = WINDOW if case["mask"] in ("window", "both") else None
    torch.manual_seed(1)
    shapes = [HEADS, case["kv_heads"], case["kv_heads"], HEADS]
    # The rounding of a score is a relative error of its exponential: scores of about 1 leave fp32 its last digits.
    *heads, grad = (torch.randn(ROWS, POSITIONS, count, HEAD_DIM) * case.get("scale", 0.7) for count in shapes)
    exact = [part.double().requires_grad_() for part in heads]
    expected = dense_attention(*exact, documents_BT, window)
    expected.backward(grad.double())

    columns = cp_columns(POSITIONS, axes, torch.device("cpu"))
    mask = build_mask(columns, documents_BT, window, axes, torch.device("cpu"))
    dtype = getattr(torch, case["dtype"])
    own = [part[:, columns].to(dtype).requires_grad_() for part in heads]
    with SentNumbers() as sent:
        found = run_attention(case["mode"], own, mask, axes)
        found.backward(grad[:, columns].to(dtype))
    pairs = [(expected, found), *((whole.grad, part.grad) for whole, part in zip(exact, own, strict=True))]
    gaps = [((a[:, columns] - b.double()).abs().max() / a.abs().max()).item() for a, b in pairs]
    # Python's own maximum passes over a NaN.
    return {**case, "gap": torch.tensor(gaps).nan_to_num(nan=torch.inf).max().item(), "sent": sent.total}


def main() -> None:
    info = read_rank_info(dict(os.environ))
    join_ranks(info, timeout_s=100)
    torch.set_num_threads(1)
    world = Axes(cp=axis_of_group(torch.distributed.group.WORLD))
    for case in json.loads(sys.argv[1]):
        ring.TILE = case.get("tile", 1024)
        result = measure(case, world)
        worst = torch.tensor(result["gap"])
        torch.distributed.all_reduce(worst, op=torch.distributed.ReduceOp.MAX)
        if info.rank == 0:
            print(json.dumps(result | {"gap": worst.item()}), flush=True)
    torch.distributed.barrier()
    close_mesh()


if __name__ == "__main__":
    main()
