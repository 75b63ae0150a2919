"""Adafactor: the second moments of a matrix as a row times a column."""

import torch
from torch.optim import Optimizer

from megascale.optim.state import new_factors, new_state
from megascale.optim.whole import WholeTensor, whole_tensors

DECAY_POWER = -0.8
CLIP_RMS = 1.0
SMALLEST_SQUARE, SMALLEST_SCALE = 1e-30, 1e-3
"""Epsilon 1 and 2 of the paper's algorithm 4, where all four numbers are from."""


class Adafactor(Optimizer):
    """Without a first moment; with updates clipped at a root mean square of 1 and relative to the parameter's size.

    Each matrix of a stack, and each vector, is clipped and scaled by itself. The learning rate is the paper's rho, by
    the run's schedule. A fused query-key-value weight is one matrix: what is estimated here is only a scale.

    Cost: for a matrix of a x b 4 (a + b) bytes of state, on each rank that updates a part; for a vector 4 per element.
    Source: Shazeer and Stern 2018, arXiv 1804.04235, algorithm 4.
    """

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                state = self.state[parameter]
                if not state:
                    state.update(new_state(parameter, group["state_kinds"]))
                state["step"] += 1
            self._decay = float(state["step"]) ** DECAY_POWER
            if group["is_matrix"]:
                whole_tensors(group).replace_gradients(self._update_matrix)
            else:
                for parameter in parameters:
                    square = self.state[parameter]["exp_avg_sq"]
                    square.lerp_(parameter.grad.square(), self._decay)
                    parameter.grad.mul_(square.clamp(min=SMALLEST_SQUARE).rsqrt_())
                whole_tensors(group).replace_gradients(self._update_vector)
            for parameter in parameters:
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(parameter.grad, alpha=-group["lr"])

    def _update_matrix(self, tensor: WholeTensor, gradient: torch.Tensor) -> None:
        if not tensor.state:
            tensor.state.update(new_factors(tensor.shape, gradient))
        row, column = tensor.state["row"], tensor.state["column"]
        squares = gradient.square()
        row.lerp_(squares.mean(dim=-1), self._decay)
        column.lerp_(squares.mean(dim=-2), self._decay)
        share = row / row.mean(dim=-1, keepdim=True).clamp_(min=SMALLEST_SQUARE)
        gradient.mul_((share[..., None] * column[..., None, :]).clamp_(min=SMALLEST_SQUARE).rsqrt_())
        scale_update(gradient, tensor.read_value(), dims=(-2, -1))

    @staticmethod
    def _update_vector(tensor: WholeTensor, gradient: torch.Tensor) -> None:
        scale_update(gradient, tensor.read_value(), dims=(-1,))


def scale_update(update: torch.Tensor, value: torch.Tensor, dims: tuple[int, ...]) -> None:
    """Clips an update in place and makes it relative to the parameter; `dims` are those of one matrix or vector."""
    size = root_mean_square(value.to(update.dtype), dims).clamp_(min=SMALLEST_SCALE)
    update.mul_(size / (root_mean_square(update, dims) / CLIP_RMS).clamp_(min=1.0))


def root_mean_square(values: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """Over these dims, which stay with size 1."""
    return values.square().mean(dim=dims, keepdim=True).sqrt_()
