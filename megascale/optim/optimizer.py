"""From the config to an optimizer over groups of parameters."""

import torch

from megascale.config.optimizer import OptimizerConfig
from megascale.optim.adafactor import Adafactor
from megascale.optim.lion import Lion
from megascale.optim.muon import Muon, SplitParts
from megascale.optim.state import EMA


def build_optimizer(
    groups: list[dict], config: OptimizerConfig, *, split_parts: SplitParts, is_fp32: bool
) -> torch.optim.Optimizer:
    """The optimizer of a config.

    AdamW runs in one fused kernel per tensor, also on the CPU: for one flat fp32 tensor of 2 million elements on one
    AVX-512 core a step took 0.9 ms fused, 3.1 ms foreach and 3.9 ms in the plain loop (torch 2.13).

    Args:
        groups: of `megascale.optim.groups.parameter_groups`.
        split_parts, is_fp32: see `Muon`.
    """
    defaults = {"lr": config.learning_rate, "beta1": config.beta1, "beta2": config.beta2}
    if config.kind == "adamw":
        betas = (config.beta1, config.beta2)
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.eps, fused=True)
    elif config.kind == "lion":
        optimizer = Lion(groups, defaults)
    elif config.kind == "adafactor":
        optimizer = Adafactor(groups, {"lr": config.learning_rate})
    else:
        defaults |= {"eps": config.eps, "momentum": config.momentum}
        optimizer = Muon(groups, defaults, split_parts, is_fp32)
    if config.ema_decay is not None:
        keep_average(optimizer, config.ema_decay)
    return optimizer


def keep_average(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Moves the average of the weights towards them after each update; a skipped step has none.

    ema <- decay ema + (1 - decay) w, in fp32, on whatever part of the weights the optimizer has.
    """
    starts: dict[torch.Tensor, torch.Tensor] = {}

    def begin(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        """Notes the first weights in a plain loop, where the optimizer makes its state in its first step."""
        for group in optimizer.param_groups:
            starts.update({each: each.detach().clone() for each in group["params"] if not optimizer.state[each]})

    @torch.no_grad()
    def move(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                if EMA not in state:
                    state[EMA] = starts.pop(parameter)
                state[EMA].lerp_(parameter, 1 - decay)
        starts.clear()

    optimizer.register_step_pre_hook(begin)
    optimizer.register_step_post_hook(move)
