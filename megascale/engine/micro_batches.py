"""The part of a step that every engine shares: its micro-batches, forward and backward, and who met a bad value."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from megascale.engine.base import Objective, StepOutput
from megascale.engine.precision import MIN_LOSS_SCALE
from megascale.parallel.mesh import Mesh

FAULT_BYTES = 256
"""Room for one rank's fault, as text: on other ranks its parameters have other names."""


class Runner(Protocol):
    """Runs forward and backward of micro-batches on this rank, alone or as a part of a pipeline."""

    def run(self, micro_batches: Sequence, step: int, scale: float) -> torch.Tensor:
        """Accumulates the gradient of `scale` x (sum of losses) over the micro-batches.

        Returns:
            Sum of negative log-likelihoods in nats over this rank's label tokens, fp32 scalar on the device; equal on
            all tp ranks, zero where the last stage isn't.
        """

    def evaluate(self, batches: Sequence) -> float:
        """The same sum over whole batches without gradients and dropout."""


@dataclass(frozen=True)
class MicroBatchRunner:
    """One micro-batch after the other through a model that is whole on this rank and its tp and cp peers.

    Attributes:
        backward: turns a loss around; DeepSpeed's engine wants its own.
        own_scale: what `backward` itself multiplies a loss by.
    """

    module: torch.nn.Module
    objective: Objective
    device: torch.device
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward
    own_scale: Callable[[], float] = lambda: 1.0

    def run(self, micro_batches: Sequence, step: int, scale: float) -> torch.Tensor:
        """A loss that isn't finite makes its gradient so too (inf x 0 = NaN), so that the check of the gradient norm,
        which every rank sees, covers both.
        """
        total = torch.zeros((), device=self.device)
        factor = torch.full((), scale * self.own_scale(), device=self.device)
        # All are on their way before the first runs: later the copies would wait for the work in front of them.
        for micro_batch in [micro_batch.to(self.device) for micro_batch in micro_batches]:
            loss = self.module(*self.objective(micro_batch, step, factor))
            total += loss.detach()
            self.backward(loss * (scale * (1.0 + 0.0 * loss.detach())))
        return total

    @torch.no_grad()
    def evaluate(self, batches: Sequence) -> float:
        """Waits for the device once."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        self.module.eval()  # here, once a pass, and not in each step: setting the mode visits every module
        for batch in batches:
            total += self.module(*self.objective(batch.to(self.device), 0, None))
        self.module.train()
        return total.item()


class ComputeClock:
    """Times the work of a device from here to `stop`, without waiting for it."""

    def __init__(self, device: torch.device):
        self._is_cuda = device.type == "cuda"
        self._start, self._end = self._mark(), None

    def stop(self) -> None:
        """The work that counts has been asked for."""
        self._end = self._mark()

    def seconds(self) -> float:
        """How long it took; to be asked when the device is known to be past it."""
        return self._start.elapsed_time(self._end) / 1000 if self._is_cuda else self._end - self._start

    def _mark(self) -> torch.cuda.Event | float:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def own_share(loss: float, mesh: Mesh) -> float:
    """This rank's share of a loss that all its tp peers hold too: all of it on the first of them, nothing on others."""
    return loss if mesh.tp.rank == 0 else 0.0


class LossSum:
    """The loss summed over the ranks that hold parts of it, on its way while gradients are reduced and the update runs.

    Nothing waits for the device before `mean` is asked for.

    Args:
        own: this rank's part of the sum.
        group: `Mesh.loss_group`.
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


def gather_faults(mesh: Mesh, own_loss_is_finite: bool, bad_parameter: str | None) -> tuple[str, ...]:
    """Tells every rank what wasn't finite on which rank.

    Args:
        bad_parameter: name of this rank's first parameter with a bad gradient, None where all are finite.

    Cost: one all-gather of 256 bytes a rank on CPU, in skipped steps only.
    """
    own = "" if bad_parameter is None else f"gradient of {bad_parameter}"
    own = own if own_loss_is_finite else "loss"
    row = own.encode()[:FAULT_BYTES].ljust(FAULT_BYTES, b"\0")
    rows = torch.empty(mesh.world_size, FAULT_BYTES, dtype=torch.uint8)
    dist.all_gather(list(rows.unbind()), torch.tensor(list(row), dtype=torch.uint8), group=mesh.control_group)
    texts = [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in rows]
    faults = tuple(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text)
    return faults or ("the gradient norm, though each rank's own gradient is finite: their sum overflows",)
