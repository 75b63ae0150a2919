"""The training loss.

Shapes: B rows, T positions, V padded vocabulary.
"""

import torch
import torch.nn.functional as F

IGNORED_LABEL = -100
"""Label of a position that isn't learned from."""


def token_loss(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the labels, as a sum and a count, so that batches of unequal size can be averaged rightly.

    Computes in fp32 whatever the dtype of the logits. Padded vocabulary counts for nothing: its logits are minus
    infinity (see `head.py`).

    Returns:
        The sum of negative log-likelihoods in nats, fp32, and the number of labels that aren't -100, int64.
    """
    logits = logits_BTV.flatten(0, 1).float()
    labels = labels_BT.flatten()
    nll_sum = F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")
    return nll_sum, (labels != IGNORED_LABEL).sum()
