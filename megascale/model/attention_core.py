"""Attention itself: queries, keys and values to their mixture, however a row's positions lie over the cp ranks.

| cp ranks | mask, scores        | kernel                                                                           |
|----------|---------------------|----------------------------------------------------------------------------------|
| 1        | plain               | `scaled_dot_product_attention`, which picks flash where it can                   |
| 1        | documents or window | FlexAttention where it can be trained, else the function above with a bool mask  |
| 1        | biased scores       | the function above with the bias as its mask                                     |
| 1        | bent scores         | FlexAttention where it can be trained, else plain products                       |
| ulysses  | any                 | as with 1 rank, on whole rows of an n-th of the heads                            |
| ring     | any but a bias      | see `ring.py`                                                                    |

Shapes: B rows, T positions of queries on this rank, S of keys (T but for cross-attention and a cache), H query heads, K
kv heads, C head_dim; heads are those of this tp rank.
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

    The config's check has made sure that a ring has the usual scale and no bias.

    Shape: (B, T, H, C), (B, S, K, C) twice, to (B, T, H, C).
    Cost: forward 4 B T S H C FLOPs for S keys seen; bytes moved as in `ulysses_attend` and `ring.py`, none for cp 1.
    Source: Vaswani et al. 2017, section 3.2.1; Ainslie et al. 2023 (GQA).
    """
    if axes.cp.size == 1:
        return attend_row(q_BTHC, k_BTKC, v_BTKC, mask, scoring)
    if axes.context_attention == "ring":
        return ring_attend(q_BTHC, k_BTKC, v_BTKC, mask, axes.cp, scoring.softcap)
    return ulysses_attend(q_BTHC, k_BTKC, v_BTKC, mask, axes.cp, scoring)


def attend_row(
    q_BTHC: torch.Tensor, k_BSKC: torch.Tensor, v_BSKC: torch.Tensor, mask: AttentionMask, scoring: Scoring = PLAIN
) -> torch.Tensor:
    """Attention where this rank has whole rows; of the mask only its form for that counts.

    Shape: (B, T, H, C), (B, S, K, C) twice, to (B, T, H, C). With T other than S the mask has a dense form or hides
    nothing.
    """
    heads = tuple(part.transpose(1, 2) for part in (q_BTHC, k_BSKC, v_BSKC))
    has_tiles = mask.flex is not None and q_BTHC.shape[3] >= SMALLEST_FLEX_HEAD and scoring.bias_HTS is None
    if has_tiles:
        mixed_BHTC = flex_kernel()(
            *heads, score_mod=_bend_rule(scoring.softcap), block_mask=mask.flex, scale=scoring.scale,
            enable_gqa=q_BTHC.shape[2] != k_BSKC.shape[2],
        )
    elif scoring.softcap is not None:
        mixed_BHTC = attend_bent(*heads, _dense(mask, q_BTHC, scoring), scoring)
    else:
        mixed_BHTC = attend_fused(*heads, mask, _dense(mask, q_BTHC, scoring), scoring)
    return mixed_BHTC.transpose(1, 2)


def attend_fused(
    q_BHTC: torch.Tensor, k_BKSC: torch.Tensor, v_BKSC: torch.Tensor, mask: AttentionMask,
    seen_B1TS: torch.Tensor | None, scoring: Scoring,
) -> torch.Tensor:
    """Attention by torch's fused kernels. A bias hides keys by minus infinity, as the kernels take one mask only."""
    weights_BHTS = seen_B1TS
    if scoring.bias_HTS is not None:
        weights_BHTS = scoring.bias_HTS[None].to(q_BHTC.dtype)
        if seen_B1TS is not None:
            weights_BHTS = weights_BHTS.masked_fill(~seen_B1TS, -torch.inf)
    return F.scaled_dot_product_attention(
        q_BHTC, k_BKSC, v_BKSC, attn_mask=weights_BHTS, is_causal=weights_BHTS is None and mask.is_causal,
        scale=scoring.scale, enable_gqa=q_BHTC.shape[1] != k_BKSC.shape[1],
    )


def attend_bent(
    q_BHTC: torch.Tensor, k_BKSC: torch.Tensor, v_BKSC: torch.Tensor, seen_B1TS: torch.Tensor | None, scoring: Scoring
) -> torch.Tensor:
    """Attention with bent scores by plain products, which hold B H T S scores in fp32.

    Source: Gemma Team 2024, arXiv 2408.00118, section 2.
    """
    group_size = q_BHTC.shape[1] // k_BKSC.shape[1]
    k_BHSC, v_BHSC = (heads.repeat_interleave(group_size, dim=1) for heads in (k_BKSC, v_BKSC))
    scale = q_BHTC.shape[3] ** -0.5 if scoring.scale is None else scoring.scale
    scores_BHTS = (q_BHTC @ k_BHSC.mT).float() * scale
    if scoring.bias_HTS is not None:
        scores_BHTS = scores_BHTS + scoring.bias_HTS
    scores_BHTS = bend(scores_BHTS, scoring.softcap)
    if seen_B1TS is not None:
        scores_BHTS = scores_BHTS.masked_fill(~seen_B1TS, -torch.inf)
    return scores_BHTS.softmax(dim=-1).to(v_BHSC.dtype) @ v_BHSC


def bend(scores: torch.Tensor, softcap: float) -> torch.Tensor:
    """softcap tanh(scores / softcap)."""
    return softcap * torch.tanh(scores / softcap)


def _bend_rule(softcap: float | None) -> Callable | None:
    """`bend` for one score, as FlexAttention compiles it into its kernel."""
    return None if softcap is None else lambda score, _row, _head, _query, _key: bend(score, softcap)


def _dense(mask: AttentionMask, q_BTHC: torch.Tensor, scoring: Scoring) -> torch.Tensor | None:
    """The mask as a square of bools; None where nothing is hidden, or causal order is all and the kernel knows it."""
    is_order_known = scoring.softcap is None and scoring.bias_HTS is None
    if mask.dense_B1TS is not None or (mask.flex is None and (is_order_known or not mask.is_causal)):
        return mask.dense_B1TS
    return dense_mask(mask.documents_BT, mask.window, q_BTHC.shape[1], q_BTHC.device, is_causal=mask.is_causal)


def flex_kernel() -> Callable:
    """FlexAttention as one kernel: inside a compiled block it is compiled with that, else by itself.

    Run eagerly it would hold the square of a row.
    """
    return flex_attention if torch.compiler.is_compiling() else _compiled_flex()


@cache
def _compiled_flex() -> Callable:
    return torch.compile(flex_attention)


def ulysses_attend(
    q_BTHC: torch.Tensor, k_BTKC: torch.Tensor, v_BTKC: torch.Tensor, mask: AttentionMask, cp: Axis,
    scoring: Scoring = PLAIN,
) -> torch.Tensor:
    """Attention of whole rows by an n-th of the heads: heads are exchanged for positions before, and back after.

    Queries, keys and values go in one message; of a bias each rank takes that of its heads. Where n doesn't divide the
    K kv heads, each is repeated until it does.

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
    if scoring.bias_HTS is not None:
        scoring = scoring._replace(bias_HTS=scoring.bias_HTS.chunk(cp.size)[cp.rank])
    mixed = attend_row(*exchanged.split(counts, dim=2), mask, scoring)
    return all_to_all(mixed, cp, split_dim=1, join_dim=2)
