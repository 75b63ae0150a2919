"""The training loss.

Shapes: B rows, T positions, N = B T, V padded vocabulary.
"""

from collections.abc import Iterator

import torch

IGNORED_LABEL = -100
"""Label of a position that isn't learned from."""
CHUNK_ELEMENTS = 2**18
"""fp32 logits treated at a time on a CPU: 1 MiB, which fits a core's cache."""
DEVICE_CHUNK_ELEMENTS = 2**26
"""The same elsewhere: 256 MiB, enough to fill any GPU."""


def token_loss(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the labels, as a sum and a count, so that batches of unequal size can be averaged rightly.

    Computes in fp32 whatever the dtype of the logits. Padded vocabulary counts for nothing: its logits are minus
    infinity (see `head.py`).

    Returns:
        The sum of negative log-likelihoods in nats, fp32, and the number of labels that aren't -100, int64.
    """
    labels_N = labels_BT.flatten()
    return ChunkedCrossEntropy.apply(logits_BTV.flatten(0, 1), labels_N), (labels_N != IGNORED_LABEL).sum()


class ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of -log softmax(logits)[label], a chunk of rows at a time.

    The plain operators make the logits of the whole batch in fp32, their log-softmax, and a gradient of each. Here only
    the logits as given are kept, and fp32 lives within a chunk; the backward pass computes the softmax again.
    """

    @staticmethod
    def forward(ctx, logits_NV: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits_NV, labels_N)
        nll_sum = torch.zeros((), device=logits_NV.device)
        for logits_nV, labels_n in chunks_of(logits_NV, labels_N):
            picked_n = logits_nV.float().log_softmax(dim=-1).gather(1, targets_of(labels_n))[:, 0]
            nll_sum -= torch.where(labels_n == IGNORED_LABEL, 0, picked_n).sum()
        return nll_sum

    @staticmethod
    def backward(ctx, grad_sum: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits_NV, labels_N = ctx.saved_tensors
        grad_NV = torch.empty_like(logits_NV)
        for logits_nV, labels_n, grad_nV in chunks_of(logits_NV, labels_N, grad_NV):
            probs_nV = logits_nV.float().softmax(dim=-1)
            probs_nV.scatter_add_(1, targets_of(labels_n), probs_nV.new_full((len(labels_n), 1), -1))
            weight_n = torch.where(labels_n == IGNORED_LABEL, 0, grad_sum)
            grad_nV.copy_(probs_nV.mul_(weight_n[:, None]))
        return grad_NV, None


def chunks_of(logits_NV: torch.Tensor, *others: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The tensors side by side, a chunk of rows at a time."""
    num_elements = CHUNK_ELEMENTS if logits_NV.device.type == "cpu" else DEVICE_CHUNK_ELEMENTS
    num_rows = max(1, num_elements // logits_NV.shape[1])
    return zip(*(tensor.split(num_rows) for tensor in (logits_NV, *others)), strict=True)


def targets_of(labels_n: torch.Tensor) -> torch.Tensor:
    """Labels as a column of legal indices."""
    return torch.where(labels_n == IGNORED_LABEL, 0, labels_n)[:, None]
