"""Attention kernels of one tile: what a machine can do, and one call for the forward and the backward pass.

Ring attention works tile by tile and needs what `scaled_dot_product_attention` keeps to itself: the log-sum-exp of each
query's scores, and a backward pass that takes those of the whole row. On a CPU, and in half precision on a CUDA device
from Ampere on, torch's flash kernels give both; a tile with a mask, and all else, is done by plain products, the same
code on every device.

Shapes: B rows, T queries, S keys, H query heads, K kv heads, G = H / K, C head_dim; Q = G T.
Source: Dao 2023 (FlashAttention-2), section 3.1.
"""

from functools import cache
from importlib.util import find_spec

import torch

aten = torch.ops.aten

NOTHING_SEEN = -1e30
"""Log-sum-exp of a query that sees no key. Finite, so that differences stay numbers; any real score outweighs it."""


@cache
def can_train_flex(device: torch.device) -> bool:
    """Whether FlexAttention can be trained: it has no backward pass on CPUs, its GPU kernels need triton and Ampere."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) and bool(find_spec("triton"))


def has_flash(q_BHTC: torch.Tensor) -> bool:
    """Whether a flash kernel takes these queries."""
    if q_BHTC.device.type == "cpu":
        return True
    return (
        q_BHTC.device.type == "cuda"
        and q_BHTC.dtype in (torch.bfloat16, torch.float16)
        and q_BHTC.shape[-1] % 8 == 0
        and q_BHTC.shape[-1] <= 256
        and torch.cuda.get_device_capability(q_BHTC.device) >= (8, 0)
    )


def tile_forward(
    q_BHTC: torch.Tensor,
    k_BKSC: torch.Tensor,
    v_BKSC: torch.Tensor,
    is_causal: bool = False,
    seen_BTS: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of queries over the keys of one tile.

    Args:
        is_causal: query i sees keys 0 to i; for T = S and no mask.
        seen_BTS: bool, True where the query sees the key; B may be 1. A query may see none.
        softcap: scores are bent to softcap tanh(score / softcap).

    Returns:
        mixed_BHTC, softmax over the tile's keys alone, 0 for a query that sees none; lse_BHT in fp32.
    Cost: 4 B H T S C FLOPs (half when causal). Plain products hold B H T S fp32 scores, flash kernels none.
    """
    if seen_BTS is None and softcap is None and has_flash(q_BHTC):
        if q_BHTC.is_cuda:
            mixed_BHTC, lse_BHT, *_ = aten._scaled_dot_product_flash_attention(q_BHTC, k_BKSC, v_BKSC, 0.0, is_causal)
        else:
            mixed_BHTC, lse_BHT = aten._scaled_dot_product_flash_attention_for_cpu(
                q_BHTC, k_BKSC, v_BKSC, 0.0, is_causal
            )
        return mixed_BHTC, lse_BHT
    scores_BKQS = _hide(_scores(q_BHTC, k_BKSC, softcap), q_BHTC.shape[2], is_causal, seen_BTS)
    lse_BKQ1 = scores_BKQS.logsumexp(dim=-1, keepdim=True).clamp(min=NOTHING_SEEN)
    mixed_BKQC = _product((scores_BKQS - lse_BKQ1).exp_().to(v_BKSC.dtype), v_BKSC)
    return mixed_BKQC.reshape(q_BHTC.shape), lse_BKQ1.reshape(q_BHTC.shape[:3])


def tile_backward(
    grad_BHTC: torch.Tensor,
    q_BHTC: torch.Tensor,
    k_BKSC: torch.Tensor,
    v_BKSC: torch.Tensor,
    mixed_BHTC: torch.Tensor,
    lse_BHT: torch.Tensor,
    is_causal: bool = False,
    seen_BTS: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """This tile's part of the gradients of attention over the whole row.

    Args:
        mixed_BHTC, lse_BHT: result and log-sum-exp over all keys of the row, not those of the tile.

    Returns:
        grad_q_BHTC, grad_k_BKSC, grad_v_BKSC: to be added to those of the other tiles.
    Cost: 10 B H T S C FLOPs (half when causal): five products, of which one gives the scores again.
    """
    if seen_BTS is None and softcap is None and has_flash(q_BHTC):
        saved = (q_BHTC, k_BKSC, v_BKSC, mixed_BHTC, lse_BHT.contiguous())
        if q_BHTC.is_cuda:
            # Without dropout the random state is an argument that nothing reads.
            no_seed = torch.empty(2, dtype=torch.uint64, device=q_BHTC.device)
            return aten._scaled_dot_product_flash_attention_backward(
                grad_BHTC, *saved, None, None, q_BHTC.shape[2], k_BKSC.shape[2], 0.0, is_causal, no_seed, no_seed
            )
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad_BHTC, *saved, 0.0, is_causal)
    scale = q_BHTC.shape[-1] ** -0.5
    shared = k_BKSC.shape[1]
    scores_BKQS = _scores(q_BHTC, k_BKSC, softcap)
    slope_BKQS = scale if softcap is None else scale * (1 - (scores_BKQS / softcap).square())
    scores_BKQS = _hide(scores_BKQS, q_BHTC.shape[2], is_causal, seen_BTS)
    weights_BKQS = scores_BKQS.sub_(_grouped(lse_BHT[..., None], shared)).exp_()
    grad_BKQC, dtype = _grouped(grad_BHTC, shared), q_BHTC.dtype
    delta_BKQ1 = (grad_BKQC.float() * _grouped(mixed_BHTC, shared)).sum(dim=-1, keepdim=True)
    grad_v_BKSC = _product(weights_BKQS.to(dtype).mT, grad_BKQC)
    grad_scores_BKQS = (weights_BKQS * (_product(grad_BKQC, v_BKSC.mT) - delta_BKQ1) * slope_BKQS).to(dtype)
    grad_q_BKQC = _product(grad_scores_BKQS, k_BKSC)
    grad_k_BKSC = _product(grad_scores_BKQS.mT, _grouped(q_BHTC, shared))
    return grad_q_BKQC.reshape(q_BHTC.shape), grad_k_BKSC, grad_v_BKSC


def _scores(q_BHTC: torch.Tensor, k_BKSC: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Shape: (B, K, Q, S) fp32."""
    scores_BKQS = _product(_grouped(q_BHTC, k_BKSC.shape[1]), k_BKSC.mT) * q_BHTC.shape[-1] ** -0.5
    return scores_BKQS if softcap is None else softcap * torch.tanh(scores_BKQS / softcap)


def _hide(
    scores_BKQS: torch.Tensor, num_queries: int, is_causal: bool, seen_BTS: torch.Tensor | None
) -> torch.Tensor:
    """The scores, in place -inf where the query doesn't see the key."""
    if is_causal:
        shape = (1, num_queries, scores_BKQS.shape[-1])
        seen_BTS = torch.ones(shape, dtype=torch.bool, device=scores_BKQS.device).tril()
    if seen_BTS is None:
        return scores_BKQS
    scores_BKGTS = scores_BKQS.unflatten(2, (-1, num_queries))
    return scores_BKGTS.masked_fill_(~seen_BTS[:, None, None], -torch.inf).flatten(2, 3)


def _grouped(heads_BHTC: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """The query heads of a kv head one after the other along the positions. Shape: (B, H, T, C) to (B, K, Q, C)."""
    return heads_BHTC.unflatten(1, (kv_heads, -1)).flatten(2, 3)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """A matrix product in fp32: of half-precision factors on a GPU's tensor cores, elsewhere of factors made fp32."""
    if left.is_cuda and left.dtype != torch.float32:
        product = torch.bmm(left.flatten(0, 1), right.flatten(0, 1), out_dtype=torch.float32)
        return product.unflatten(0, left.shape[:2])
    return left.float() @ right.float()
