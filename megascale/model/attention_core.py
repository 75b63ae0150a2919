"""Attention itself: queries, keys and values to their mixture, however a row's positions lie over the cp ranks.

| cp ranks | mask                | kernel                                                                           |
|----------|---------------------|----------------------------------------------------------------------------------|
| 1        | plain causal        | `scaled_dot_product_attention`, which picks flash where it can                   |
| 1        | documents or window | FlexAttention where it can be trained, else the function above with a bool mask  |
| ulysses  | any                 | as with 1 rank, on whole rows of an n-th of the heads                            |
| ring     | any                 | see `ring.py`                                                                    |

Shapes: B rows, T positions of attention on this rank, H query heads, K kv heads, C head_dim; heads are those of this
tp rank.
"""

from collections.abc import Callable
from functools import cache
from math import lcm
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from megascale.model.attention_mask import AttentionMask, dense_mask
from megascale.model.axes import Axes
from megascale.model.ring import ring_attend
from megascale.parallel.axis import Axis
from megascale.parallel.collectives import all_to_all

SMALLEST_FLEX_HEAD = 16
"""Features per head below which FlexAttention refuses; only toy models have so few."""


class Scoring(NamedTuple):
    """How queries and keys become scores, before the softmax: softcap(scale q k + bias).

    Attributes:
        scale: factor of the product; None: 1 / sqrt(C).
        softcap: scores are bent to softcap tanh(score / softcap); None: not bent.
        bias_HTS: added to the scores of each of this rank's heads over the whole row; None: nothing.
    """

    scale: float | None = None
    softcap: float | None = None
    bias_HTS: torch.Tensor | None = None


PLAIN = Scoring()
"""q k / sqrt(C)."""


def attend(
    q_BTHC: torch.Tensor, k_BTKC: torch.Tensor, v_BTKC: torch.Tensor, mask: AttentionMask, axes: Axes,
    scoring: Scoring = PLAIN,
) -> torch.Tensor:
    """Mixes values by the softmax of scores over the keys that the mask lets each query see.

    Shape: (B, T, H, C), (B, T, K, C) twice, to (B, T, H, C).
    Cost: forward 4 B T S H C FLOPs for S keys seen; bytes moved as in `ulysses_attend` and `ring.py`, none for cp 1.
    Source: Vaswani et al. 2017, section 3.2.1; Ainslie et al. 2023 (GQA).
    """
    if axes.cp.size == 1:
        return attend_row(q_BTHC, k_BTKC, v_BTKC, mask, scoring)
    if axes.context_attention == "ring":
        return ring_attend(q_BTHC, k_BTKC, v_BTKC, mask, axes.cp)
    return ulysses_attend(q_BTHC, k_BTKC, v_BTKC, mask, axes.cp)


def attend_row(
    q_BTHC: torch.Tensor, k_BTKC: torch.Tensor, v_BTKC: torch.Tensor, mask: AttentionMask, scoring: Scoring = PLAIN
) -> torch.Tensor:
    """Attention where this rank has whole rows."""
    q_BHTC, k_BKTC, v_BKTC = (heads.transpose(1, 2) for heads in (q_BTHC, k_BTKC, v_BTKC))
    is_grouped = q_BTHC.shape[2] != k_BTKC.shape[2]
    seen_B1TS = mask.dense_B1TS
    if mask.flex is not None:
        if q_BTHC.shape[3] >= SMALLEST_FLEX_HEAD:
            mixed_BHTC = flex_kernel()(q_BHTC, k_BKTC, v_BKTC, block_mask=mask.flex, enable_gqa=is_grouped)
            return mixed_BHTC.transpose(1, 2)
        seen_B1TS = dense_mask(
            mask.documents_BT, mask.window, q_BTHC.shape[1], q_BTHC.device, is_causal=mask.is_causal
        )
    mixed_BHTC = F.scaled_dot_product_attention(
        q_BHTC, k_BKTC, v_BKTC, attn_mask=seen_B1TS, is_causal=seen_B1TS is None and mask.is_causal,
        enable_gqa=is_grouped,
    )
    return mixed_BHTC.transpose(1, 2)


def flex_kernel() -> Callable:
    """FlexAttention as one kernel: inside a compiled block it is compiled with that, else by itself.

    Run eagerly it would hold the square of a row.
    """
    return flex_attention if torch.compiler.is_compiling() else _compiled_flex()


@cache
def _compiled_flex() -> Callable:
    return torch.compile(flex_attention)


def ulysses_attend(
    q_BTHC: torch.Tensor, k_BTKC: torch.Tensor, v_BTKC: torch.Tensor, mask: AttentionMask, cp: Axis
) -> torch.Tensor:
    """Attention of whole rows by an n-th of the heads: heads are exchanged for positions before, and back after.

    Queries, keys and values go in one message. Where n doesn't divide the K kv heads, each is repeated until it does.

    The config's check has made sure that n divides H.

    Cost: each rank sends (2 H + 2 K') B T C (n - 1) / n numbers forward and as many backward, with T its positions and
    K' the least common multiple of K and n.
    Source: Jacobs et al. 2023 (DeepSpeed-Ulysses), section 3.
    """
    repeats = lcm(k_BTKC.shape[2], cp.size) // k_BTKC.shape[2]
    if repeats > 1:
        k_BTKC, v_BTKC = k_BTKC.repeat_interleave(repeats, dim=2), v_BTKC.repeat_interleave(repeats, dim=2)
    per_rank = [heads.unflatten(2, (cp.size, -1)) for heads in (q_BTHC, k_BTKC, v_BTKC)]
    counts = [heads.shape[3] for heads in per_rank]
    exchanged = all_to_all(torch.cat(per_rank, dim=3).flatten(2, 3), cp, split_dim=2, join_dim=1)
    mixed = attend_row(*exchanged.split(counts, dim=2), mask)
    return all_to_all(mixed, cp, split_dim=1, join_dim=2)
