"""The part of a step that every engine shares: its micro-batches, forward and backward, and who met a bad value."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megascale.engine.base import Objective, StepOutput
from megascale.engine.flat_zero import FINITE
from megascale.engine.precision import MIN_LOSS_SCALE
from megascale.parallel.mesh import Mesh

NO_FAULT, LOSS_FAULT, FIRST_GRADIENT_FAULT = 0, 1, 2


def run_micro_batches(
    module: torch.nn.Module,
    micro_batches: Sequence,
    objective: Objective,
    step: int,
    scale: float,
    device: torch.device,
    backward: Callable[[torch.Tensor], None],
) -> torch.Tensor:
    """Accumulates the gradient of `scale` x (sum of losses) over the micro-batches.

    A loss that isn't finite makes its gradient so too (inf x 0 = NaN), so that the check of the gradient norm, which
    every rank sees, covers both.

    Returns:
        Sum of negative log-likelihoods in nats over this rank's label tokens, fp32 scalar on the device.
    """
    total = torch.zeros((), device=device)
    for micro_batch in micro_batches:
        loss = objective(module, micro_batch.to(device), step)
        total += loss.detach()
        backward(loss * (scale * (1.0 + 0.0 * loss.detach())))
    return total


@torch.no_grad()
def evaluate_batch(module: torch.nn.Module, batch, objective: Objective, device: torch.device) -> float:
    """Sum of negative log-likelihoods in nats over a batch, without dropout."""
    module.eval()
    loss = objective(module, batch.to(device), 0).item()
    module.train()  # here, once a batch, and not in each step: setting the mode visits every module
    return loss


class LossSum:
    """The loss summed over the replicas, on its way while the gradients are reduced and the update runs.

    Nothing waits for the device before `mean` is asked for.

    Args:
        own: this rank's part of the sum.
    """

    def __init__(self, own: torch.Tensor, group: dist.ProcessGroup):
        self.own, self.total = own, own.clone()
        is_shared = dist.get_world_size(group) > 1
        self.work = dist.all_reduce(self.total, group=group, async_op=True) if is_shared else None

    def mean(self, num_tokens: int) -> float:
        """Mean loss per label token over the replicas, in nats."""
        if self.work is not None:
            self.work.wait()
        return self.total.item() / num_tokens

    def own_is_finite(self) -> bool:
        """Whether this rank's part is a number."""
        return bool(torch.isfinite(self.own))


def describe_step(
    loss_sum: LossSum,
    num_tokens: int,
    grad_norm: float,
    loss_scale: float,
    is_skipped: bool,
    has_dynamic_scale: bool,
    find_faults: Callable[[bool], tuple[str, ...]],
) -> StepOutput:
    """What a step reports, equal on every rank.

    An fp16 overflow is one that a lower loss scale may cure: a loss that isn't finite itself never is.

    Args:
        find_faults: told whether this rank's loss is finite, gathers who met what; called on all ranks or on none.
    """
    loss = loss_sum.mean(num_tokens)
    return StepOutput(
        loss=loss,
        grad_norm=math.inf if is_skipped else float(grad_norm),
        num_tokens=num_tokens,
        loss_scale=loss_scale,
        is_skipped=is_skipped,
        is_overflow=is_skipped and has_dynamic_scale and loss_scale > MIN_LOSS_SCALE and math.isfinite(loss),
        faults=find_faults(loss_sum.own_is_finite()) if is_skipped else (),
    )


def gather_faults(mesh: Mesh, own_loss_is_finite: bool, bad_parameter: int, names: Sequence[str]) -> tuple[str, ...]:
    """Tells every rank what wasn't finite on which rank.

    Args:
        bad_parameter: index in `names` of this rank's first parameter with a bad gradient, or FINITE.
    """
    own = NO_FAULT if bad_parameter == FINITE else FIRST_GRADIENT_FAULT + bad_parameter
    own = own if own_loss_is_finite else LOSS_FAULT
    faults = []
    for rank, code in enumerate(mesh.control_gather(own)):
        if code == LOSS_FAULT:
            faults.append(f"rank {rank}: loss")
        elif code >= FIRST_GRADIENT_FAULT:
            faults.append(f"rank {rank}: gradient of {names[code - FIRST_GRADIENT_FAULT]}")
    return tuple(faults) or ("the gradient norm, though each rank's own gradient is finite: their sum overflows",)
