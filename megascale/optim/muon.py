"""Muon: hidden matrices move by an orthogonalised momentum, everything else by AdamW."""

from collections.abc import Callable, Iterable

import torch
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from megascale.optim.state import new_state
from megascale.optim.whole import WholeTensor, whole_tensors

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic: the steepest at zero that leaves singular values within about 0.7 to 1.2 (Jordan 2024)."""
ITERATIONS = 5
EPS = 1e-7
RMS_OF_ADAMW = 0.2
"""What the root mean square of AdamW's updates is in practice (Liu et al. 2025, section 2.2)."""

SplitParts = Callable[[str, torch.Tensor], Iterable[torch.Tensor]]
"""(global name, whole tensor) -> views of the matrices that are fused in it, each to be treated by itself. The last dim
of a view is the matrix's inputs; the others together are its outputs, unless the view is the tensor itself: then it is
a stack, and all dims but the last two count matrices."""


class Muon(Optimizer):
    """Groups with `is_matrix` by Muon with Nesterov momentum, the others by AdamW, with one learning rate for both.

    m <- mu m + (1 - mu) g;  u = (1 - mu) g + mu m;  w <- w - lr (0.2 sqrt(max(rows, columns)) orthogonal(u) + decay w).
    The factor makes an update as large as AdamW's, so that learning rate and weight decay keep their meaning.

    Args:
        split_parts: see `SplitParts`.
        is_fp32: whether to orthogonalise in fp32; in bf16 otherwise, as both papers do.

    Cost: 4 bytes of state per element of a matrix; per matrix of a x b, a <= b, 5 iterations of 4 a a b + 2 a a a
        FLOPs, less than 1 % of a step of 0.5 million tokens.
    Source: Jordan 2024, https://kellerjordan.github.io/posts/muon/; Liu et al. 2025, arXiv 2502.16982, section 2.
    """

    def __init__(self, groups: list[dict], defaults: dict, split_parts: SplitParts, is_fp32: bool):
        super().__init__([group | {"fused": not group["is_matrix"]} for group in groups], defaults)
        self.split_parts, self.is_fp32 = split_parts, is_fp32

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                if not self.state[parameter]:
                    device = parameter.device if group["fused"] else "cpu"
                    self.state[parameter].update(new_state(parameter, group["state_kinds"], device))
            if not parameters:
                continue
            if group["is_matrix"]:
                self._step_matrices(group, parameters)
            else:
                self._step_adamw(group, parameters)

    def _step_matrices(self, group: dict, parameters: list[torch.Tensor]) -> None:
        for parameter in parameters:
            state, gradient = self.state[parameter], parameter.grad
            state["step"] += 1
            state["momentum"].lerp_(gradient, 1 - group["momentum"])
            gradient.lerp_(state["momentum"], group["momentum"])
        whole_tensors(group).replace_gradients(self._orthogonalise)
        for parameter in parameters:
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(parameter.grad, alpha=-group["lr"])

    def _orthogonalise(self, tensor: WholeTensor, gradient: torch.Tensor) -> None:
        for part in self.split_parts(tensor.name, gradient):
            matrices = part if part is gradient else part.reshape(-1, part.shape[-1])
            scale = RMS_OF_ADAMW * max(matrices.shape[-2:]) ** 0.5
            update = orthogonal(matrices if self.is_fp32 else matrices.bfloat16())
            part.copy_(update.view(part.shape).float().mul_(scale))

    def _step_adamw(self, group: dict, parameters: list[torch.Tensor]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters, [parameter.grad for parameter in parameters],
            *([state[kind] for state in states] for kind in ("exp_avg", "exp_avg_sq")), [],
            [state["step"] for state in states], fused=True, amsgrad=False, maximize=False,
            lr=group["lr"], beta1=group["beta1"], beta2=group["beta2"], eps=group["eps"],
            weight_decay=group["weight_decay"],
        )


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """About U V^T for matrices U S V^T, by Newton-Schulz iterations in their own number format.

    Shape: (..., rows, columns) to the same.
    Source: Jordan 2024.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.reshape(-1, *matrices.shape[-2:])
    x = x.mT if is_tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=EPS)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).reshape(matrices.shape)
