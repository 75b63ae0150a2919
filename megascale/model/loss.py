"""The training loss: the head's product and the cross-entropy as one, so that the logits never fill memory.

Shapes: N positions, n positions of a chunk, D d_model, V padded vocabulary, v = V / tp.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from megascale.parallel.axis import Axis
from megascale.parallel.collectives import start_all_reduce

IGNORED_LABEL = -100
"""Label of a position that isn't learned from."""
CHUNK_ELEMENTS = 2**20
"""Logits treated at a time on a CPU: 4 MiB, small beside a model yet rows enough for a good matrix product."""
DEVICE_CHUNK_ELEMENTS = 2**26
"""The same elsewhere: 256 MiB, enough to fill any GPU."""
TILE_ROWS = 128
"""Rows of a tile of a GPU's matrix product."""
FP16_SCALE = 2.0**8
"""Factor of the logits' gradient in fp16, whose smallest number, 6e-8, is more than many a probability."""


def linear_cross_entropy(
    hidden_ND: torch.Tensor, weight_vD: torch.Tensor, labels_N: torch.Tensor, vocab_size: int, tp: Axis,
    softcap: float | None = None, bias_v: torch.Tensor | None = None, label_smoothing: float = 0.0,
) -> torch.Tensor:
    """The sum of -log softmax(hidden weight^T + bias)[label] over the labels that aren't -100.

    The gradients of hidden and weight are computed in the forward pass, a chunk of rows at a time while its logits are
    there; the backward pass only multiplies them by the incoming scalar. Softmax and sums are in fp32 whatever the
    dtype of the inputs; the weight's gradient adds up over the chunks in fp32.

    Args:
        weight_vD: this rank's run of the vocabulary's rows, the first of them of id `tp.rank * v`. Ids from
            `vocab_size` on count for nothing.
        tp: the ranks that share the vocabulary. All call this with equal hidden states and labels; the gradient of the
            hidden state is this rank's part of a sum over them.
        softcap: logits are bent to softcap tanh(logit / softcap) before the softmax.
        bias_v: of this rank's ids, where the head has one.
        label_smoothing: share of the target's probability that is spread over all ids (Szegedy et al. 2015, section 7).

    Returns:
        fp32 scalar in nats, equal on every rank of tp.
    Raises:
        RuntimeError: a label is neither -100 nor an id of the vocabulary.
    Cost: 6 N D v FLOPs with gradients, 2 N D v without; a chunk of logits, and from forward to backward N D + 2 v D
        (bf16) or N D + v D (fp32) elements. Over tp each rank all-reduces 12 N bytes, in two calls a chunk.
    Source: the fusion is that of Liger Kernel, Hsu et al. 2024, section 3; the sharing that of Shoeybi et al. 2019,
        section 3.
    """
    device_type = hidden_ND.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden_ND, weight_vD = hidden_ND.to(dtype), weight_vD.to(dtype)
        bias_v = None if bias_v is None else bias_v.to(dtype)
    has_gradients = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_vD.requires_grad)
    return LinearCrossEntropy.apply(hidden_ND, weight_vD, bias_v, labels_N, vocab_size, tp, has_gradients, softcap,
                                    label_smoothing)


class LinearCrossEntropy(torch.autograd.Function):
    """See `linear_cross_entropy`."""

    @staticmethod
    def forward(
        ctx, hidden_ND, weight_vD, bias_v, labels_N, vocab_size: int, tp: Axis, has_gradients: bool,
        softcap: float | None, label_smoothing: float,
    ):
        num_columns = len(weight_vD)
        first_id = tp.rank * num_columns
        num_own = min(max(vocab_size - first_id, 0), num_columns)
        targets_N = labels_N - first_id
        is_own_N = (targets_N >= 0) & (targets_N < num_own)
        is_label_N = labels_N != IGNORED_LABEL
        is_legal_N = (labels_N >= 0) & (labels_N < vocab_size) | ~is_label_N
        torch._assert_async(is_legal_N.all(), f"a label is neither {IGNORED_LABEL} nor one of {vocab_size} token ids")
        rows = (hidden_ND, torch.where(is_own_N, targets_N, 0), is_own_N, is_label_N)
        num_rows = rows_of_chunk(num_columns, hidden_ND.device.type)
        smoothing = Smoothing(label_smoothing, vocab_size, num_own) if label_smoothing else None
        nll_sum = torch.zeros((), device=hidden_ND.device)
        gradients = Gradients(hidden_ND, weight_vD, bias_v) if has_gradients else None
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for hidden_nD, *labels_n in zip(*(each.split(num_rows) for each in rows), strict=True):
                logits_nv = F.linear(hidden_nD, weight_vD, bias_v)
                slope_nv = None if softcap is None else bend_in_place(logits_nv, softcap)
                logits_nv[:, num_own:] = float("-inf")
                chunk_sum, grad_nv = chunk_loss(logits_nv, *labels_n, tp, has_gradients, smoothing)
                nll_sum += chunk_sum
                if gradients is not None:
                    grad_nv = grad_nv if slope_nv is None else grad_nv.mul_(slope_nv)
                    gradients.add(hidden_nD, weight_vD, grad_nv)
        if gradients is not None:
            ctx.weight_dtype = weight_vD.dtype
            ctx.save_for_backward(gradients.hidden_ND, gradients.weight_vD, gradients.bias_v)
        return nll_sum

    @staticmethod
    def backward(ctx, grad_sum: torch.Tensor):
        hidden_ND, weight_vD, bias_v = ctx.saved_tensors
        # In fp32: a factor rounded to half precision, or beyond its range, would spoil every gradient of the model.
        grad_hidden_ND = (hidden_ND.float() * (grad_sum / gradient_scale(hidden_ND))).to(hidden_ND.dtype)
        grad_weight_vD = (weight_vD * grad_sum).to(ctx.weight_dtype)
        grad_bias_v = None if bias_v is None else (bias_v * grad_sum).to(ctx.weight_dtype)
        return grad_hidden_ND, grad_weight_vD, grad_bias_v, None, None, None, None, None, None


def bend_in_place(logits_nv: torch.Tensor, softcap: float) -> torch.Tensor:
    """Makes the logits softcap tanh(logit / softcap), and gives the slope of that at each, fp32."""
    share_nv = (logits_nv.float() / softcap).tanh_()
    logits_nv.copy_(share_nv * softcap)
    return share_nv.square_().neg_().add_(1)


class Gradients:
    """The gradients of both factors of the logits, from one chunk of rows after the other.

    Attributes:
        hidden_ND: in the dtype of the hidden state, times `gradient_scale`.
        weight_vD, bias_v: fp32, the sums over the chunks so far; no bias, no sum.
    """

    def __init__(self, hidden_ND: torch.Tensor, weight_vD: torch.Tensor, bias_v: torch.Tensor | None):
        self.hidden_ND = torch.empty_like(hidden_ND)
        self.weight_vD = torch.zeros_like(weight_vD, dtype=torch.float32)
        self.bias_v = None if bias_v is None else torch.zeros_like(bias_v, dtype=torch.float32)
        self.num_done = 0

    def add(self, hidden_nD: torch.Tensor, weight_vD: torch.Tensor, grad_nv: torch.Tensor) -> None:
        """Adds the next chunk, whose logits have this gradient times `gradient_scale`."""
        start, self.num_done = self.num_done, self.num_done + len(hidden_nD)
        torch.mm(grad_nv, weight_vD, out=self.hidden_ND[start : self.num_done])
        if hidden_nD.dtype == torch.float32:
            self.weight_vD.addmm_(grad_nv.t(), hidden_nD)
        else:
            self.weight_vD += grad_nv.t() @ (hidden_nD / gradient_scale(hidden_nD))
        if self.bias_v is not None:
            self.bias_v += grad_nv.sum(dim=0, dtype=torch.float32) / gradient_scale(hidden_nD)


class Smoothing(NamedTuple):
    """How the target's probability is spread.

    Attributes:
        share: of it that goes to all ids alike.
        num_ids: of the vocabulary.
        num_own: columns of this rank that are ids.
    """

    share: float
    num_ids: int
    num_own: int

    @property
    def each(self) -> float:
        """What an id gets of it."""
        return self.share / self.num_ids


def chunk_loss(
    logits_nv: torch.Tensor,
    targets_n: torch.Tensor,
    is_own_n: torch.Tensor,
    is_label_n: torch.Tensor,
    tp: Axis,
    has_gradients: bool,
    smoothing: Smoothing | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The loss of a chunk, and its gradient times `gradient_scale` in the logits' dtype. May overwrite the logits.

    Args:
        targets_n: the label's column on this rank, 0 where another rank has it.
        is_own_n: whether this rank has the label's column.
    """
    scores_nv, targets_n1 = logits_nv.float(), targets_n[:, None]
    top_n = start_all_reduce(scores_nv.amax(dim=1), tp, "max")()
    scores_nv.sub_(top_n[:, None])
    picked_n = torch.where(is_own_n, scores_nv.gather(1, targets_n1)[:, 0], 0)
    spread = () if smoothing is None else (scores_nv[:, : smoothing.num_own].sum(dim=1),)
    scores_nv.exp_()
    total_n, picked_n, *spread = start_all_reduce(torch.stack((scores_nv.sum(dim=1), picked_n, *spread)), tp)()
    wanted_n = picked_n if smoothing is None else picked_n * (1 - smoothing.share) + spread[0] * smoothing.each
    nll_sum = torch.where(is_label_n, total_n.log() - wanted_n, 0).sum()
    if not has_gradients:
        return nll_sum, None
    factor_n = is_label_n * gradient_scale(logits_nv)
    grad_nv = scores_nv.mul_((factor_n / total_n)[:, None])
    missing = 1.0  # of the label's probability, when it has none
    if smoothing is not None:
        grad_nv[:, : smoothing.num_own] -= smoothing.each * factor_n[:, None]
        missing = 1.0 - smoothing.share + smoothing.each
    grad_nv = grad_nv.to(logits_nv.dtype)
    # The label's column by itself, before it is rounded: softmax - 1 would cancel where the model is sure.
    label_n1 = ((picked_n.exp() / total_n - missing) * factor_n).to(grad_nv.dtype)[:, None]
    grad_nv.scatter_(1, targets_n1, torch.where(is_own_n[:, None], label_n1, grad_nv.gather(1, targets_n1)))
    return nll_sum, grad_nv


def gradient_scale(tensor: torch.Tensor) -> float:
    """The factor that the logits' gradient carries until the backward pass."""
    return FP16_SCALE if tensor.dtype == torch.float16 else 1.0


def rows_of_chunk(num_columns: int, device_type: str) -> int:
    """How many rows of logits are treated at a time; whole tiles of a GPU's matrix product, where there are several."""
    num_rows = max(1, (CHUNK_ELEMENTS if device_type == "cpu" else DEVICE_CHUNK_ELEMENTS) // num_columns)
    return num_rows if device_type == "cpu" or num_rows < TILE_ROWS else num_rows // TILE_ROWS * TILE_ROWS
