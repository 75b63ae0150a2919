"""The engine of ZeRO-0 and ZeRO-1: every rank has whole parameters and gradients; optimizer state may be shared out."""

from collections.abc import Iterator, Sequence

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScalerBase

from megascale.engine.base import Objective, StatePiece, StepOutput
from megascale.engine.flat_zero import FlatZeroOptimizer
from megascale.engine.fragments import linked_pieces
from megascale.engine.micro_batches import LossSum, describe_step, evaluate_batch, gather_faults, run_micro_batches
from megascale.engine.precision import restore_scaler, scaler_values
from megascale.parallel.mesh import Mesh


class WholeGradientEngine:
    """Runs the model directly and lets `FlatZeroOptimizer` reduce, clip, update and gather.

    Args:
        names: name of each parameter, in the model's order.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: FlatZeroOptimizer,
        names: dict[torch.nn.Parameter, str],
        objective: Objective,
        scaler: LossScalerBase,
        mesh: Mesh,
    ):
        self.model, self.optimizer, self.names = model, optimizer, names
        self.objective, self.scaler, self.mesh = objective, scaler, mesh

    def train_step(self, micro_batches: Sequence, *, step: int, num_tokens: int, learning_rate: float) -> StepOutput:
        scale = self.scaler.loss_scale
        own_loss = run_micro_batches(
            self.model, micro_batches, self.objective, step, scale / num_tokens, self.mesh.device, torch.Tensor.backward
        )
        loss_sum = LossSum(own_loss, self.mesh.dp_group)
        self.optimizer.reduce_gradients(unscale=1.0 / scale)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        output = describe_step(
            loss_sum, num_tokens, self.optimizer._global_grad_norm, scale, self.optimizer.overflow, self.scaler.dynamic,
            self._faults,
        )
        self.scaler.update_scale(output.is_overflow)
        return output

    def evaluate(self, batch) -> float:
        return evaluate_batch(self.model, batch, self.objective, self.mesh.device)

    def state_pieces(self) -> Iterator[StatePiece]:
        named = [(name, parameter) for parameter, name in self.names.items()]
        if self.optimizer.is_partitioned:
            return linked_pieces(named, owner_rank=0, num_owners=1)
        return linked_pieces(named, self.mesh.dp_rank, self.mesh.layout.dp)

    def scalars(self) -> dict[str, float]:
        state = self.optimizer.state[self.optimizer.fp32_groups_flat_partition[0]]
        return {"step": float(state["step"]), **scaler_values(self.scaler)}

    def restore_scalars(self, scalars: dict[str, float]) -> None:
        for partition in self.optimizer.fp32_groups_flat_partition:
            self.optimizer.state[partition]["step"].fill_(scalars["step"])
        restore_scaler(self.scaler, scalars)
        with torch.no_grad():
            self.optimizer.update_lp_params()

    def _faults(self, own_loss_is_finite: bool) -> tuple[str, ...]:
        names = [self.names[parameter] for parameter in self.optimizer.parameters]
        return gather_faults(self.mesh, own_loss_is_finite, self.optimizer.first_nonfinite(), names)
