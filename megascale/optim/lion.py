"""Lion: the sign of a momentum."""

import torch
from torch.optim import Optimizer

from megascale.optim.state import new_state


class Lion(Optimizer):
    """Moves every element by the learning rate, in the direction of the sign of an interpolated momentum.

    u = sign(beta1 m + (1 - beta1) g);  w <- w - lr (u + decay w);  m <- beta2 m + (1 - beta2) g. Element-wise.

    Cost: 4 bytes of state per element.
    Source: Chen et al. 2023, arXiv 2302.06675, algorithm 2.
    """

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, gradient = self.state[parameter], parameter.grad
                if not state:
                    state.update(new_state(parameter, group["state_kinds"]))
                state["step"] += 1
                momentum = state["exp_avg"]
                update = momentum.lerp(gradient, 1 - group["beta1"]).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
                momentum.lerp_(gradient, 1 - group["beta2"])
