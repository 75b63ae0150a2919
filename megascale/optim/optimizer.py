"""AdamW and its two parameter groups."""

from collections.abc import Callable, Iterable

import torch
from torch import nn


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float, is_decayed: Callable[[str], bool]
) -> list[dict]:
    """Sorts parameters into those that decay and those that don't, by their global names.

    Both groups are always there, in this order, even when one is empty: a pipeline stage without norms has as many
    groups as its peers, without which their gradient norms wait for each other for ever.

    Args:
        named_parameters: global names and parameters, in the model's order, which each group keeps.
        weight_decay: per-step decay, in units of the learning rate.
        is_decayed: name -> whether decay applies; `megascale.model.sharding.is_decayed`.
    """
    decayed, kept = [], []
    for name, parameter in named_parameters:
        (decayed if is_decayed(name) else kept).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def build_adamw(
    groups: list[dict], *, learning_rate: float, beta1: float, beta2: float, eps: float
) -> torch.optim.AdamW:
    """AdamW with decoupled weight decay, in one fused kernel per tensor.

    Fused also on the CPU: for one flat fp32 tensor of 2 million elements on one AVX-512 core a step took 0.9 ms fused,
    3.1 ms foreach and 3.9 ms in the plain loop (torch 2.13).

    Source: Loshchilov and Hutter 2019.
    """
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), eps=eps, fused=True)
