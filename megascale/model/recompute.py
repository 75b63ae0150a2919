"""Activation recompute: the backward pass computes again what the forward pass didn't keep.

| mode      | kept per block                         | computed again                                        |
|-----------|----------------------------------------|-------------------------------------------------------|
| none      | everything that backward reads         | nothing                                               |
| selective | the block's input, the matrix products | norms, rotation, attention, activation, dropout, sums |
| full      | the block's input                      | the whole block                                       |

Nothing depends on a random state (see `dropout.py`), so all three give the same gradients to the bit.
Source: Chen et al. 2016; selective in the spirit of Korthikanti et al. 2022, section 5.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

RecomputeMode = Literal["none", "selective", "full"]

PRODUCTS = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default})
"""What `F.linear` becomes: the operators whose results are dear to compute for the memory that they take."""


def run_recomputed(mode: RecomputeMode, function: Callable, *inputs) -> torch.Tensor:
    """Calls the function so that its backward pass keeps what the mode keeps."""
    if mode == "none" or not torch.is_grad_enabled():
        return function(*inputs)
    if mode == "full":
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    context_fn = partial(create_selective_checkpoint_contexts, keep_products)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=context_fn)


def keep_products(_context, operator, *_args, **_kwargs) -> CheckpointPolicy:
    """The policy of `selective`: matrix products are kept, everything else is computed again."""
    return CheckpointPolicy.MUST_SAVE if operator in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def set_recompute(model: nn.Module, mode: RecomputeMode) -> None:
    """Makes every block of the model run in this mode."""
    for module in model.modules():
        if hasattr(module, "recompute"):
            module.recompute = mode
