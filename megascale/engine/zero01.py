"""The engine of ZeRO-0 and ZeRO-1: every rank has whole parameters and gradients; optimizer state may be shared out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScalerBase

from megascale.engine.base import Engine, StatePiece, StepOutput
from megascale.engine.flat_zero import FlatZeroOptimizer
from megascale.engine.fragments import linked_pieces, swap_average
from megascale.engine.micro_batches import ComputeClock, LossSum, Runner, describe_step, gather_faults, own_share
from megascale.engine.precision import restore_scaler, scaler_values
from megascale.parallel.mesh import Mesh
from megascale.parallel.placement import Placement


class WholeGradientEngine(Engine):
    """Lets a runner do forward and backward, and `FlatZeroOptimizer` reduce, clip, update and gather.

    Args:
        placements: where each parameter lies in the whole model, in the model's order.
        runner: runs this rank's part of the model, alone or in a pipeline.
    """

    def __init__(
        self,
        optimizer: FlatZeroOptimizer,
        placements: Mapping[torch.nn.Parameter, Placement],
        runner: Runner,
        scaler: LossScalerBase,
        mesh: Mesh,
    ):
        self.optimizer, self.placements, self.runner = optimizer, placements, runner
        self.scaler, self.mesh = scaler, mesh

    def train_step(self, micro_batches: Sequence, *, step: int, num_tokens: int, learning_rate: float) -> StepOutput:
        scale = self.scaler.loss_scale
        clock = ComputeClock(self.mesh.device)
        own_loss = self.runner.run(micro_batches, step, scale / num_tokens)
        clock.stop()
        loss_sum = LossSum(own_loss, self.mesh.loss_group)
        self.optimizer.reduce_gradients(unscale=1.0 / scale)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_factor", 1.0)
        self.optimizer.step()
        output = describe_step(
            loss_sum, num_tokens, self.optimizer._global_grad_norm, scale, self.optimizer.overflow, self.scaler.dynamic,
            self._faults,
        )
        self.scaler.update_scale(output.is_overflow)
        return replace(output, compute_s=clock.seconds())  # reading the loss has waited for the device

    def evaluate(self, batches: Sequence) -> float:
        return own_share(self.runner.evaluate(batches), self.mesh)

    def state_pieces(self) -> Iterator[StatePiece]:
        shares = [replicas.share for replicas in self.optimizer.replicas]
        yield from linked_pieces(self.placements, shares)
        for gathered, (share, _) in zip(self.optimizer.gathered, shares, strict=True):
            if gathered is not None:
                yield from gathered.pieces(share)

    def scalars(self) -> dict[str, float]:
        state = self.optimizer.state[self.optimizer.fp32_groups_flat_partition[0]]
        return {"step": float(state["step"]), **scaler_values(self.scaler)}

    def restore_scalars(self, scalars: dict[str, float]) -> None:
        for partition in self.optimizer.fp32_groups_flat_partition:
            self.optimizer.state[partition]["step"].fill_(scalars["step"])
        restore_scaler(self.scaler, scalars)
        with torch.no_grad():
            self.optimizer.update_lp_params()

    def swap_average(self) -> None:
        swap_average(self.optimizer, self.optimizer.fp32_groups_flat_partition)
        with torch.no_grad():
            self.optimizer.update_lp_params()

    def _faults(self, own_loss_is_finite: bool) -> tuple[str, ...]:
        return gather_faults(self.mesh, own_loss_is_finite, self.optimizer.first_nonfinite())
