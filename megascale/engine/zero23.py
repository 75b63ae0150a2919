"""The engine of ZeRO-2 and ZeRO-3: DeepSpeed's own engine, which shares out gradients and parameters too."""

from collections.abc import Iterator, Sequence

import torch

from megascale.engine.base import Objective, StatePiece, StepOutput
from megascale.engine.flat_zero import FINITE
from megascale.engine.fragments import MOMENTS, flat_pieces, init_adam_state, linked_pieces
from megascale.engine.micro_batches import (
    LossSum,
    describe_step,
    evaluate_batch,
    gather_faults,
    run_micro_batches,
)
from megascale.engine.precision import restore_scaler, scaler_values
from megascale.parallel.mesh import Mesh


class PartitionedGradientEngine:
    """Drives a DeepSpeed engine of stage 2 or 3, and knows where it keeps its state.

    Args:
        ds_engine: what `deepspeed.initialize` returned.
        names: name of each parameter, in the model's order.
        shapes: whole shape of each parameter by name; under ZeRO-3 a parameter itself is empty between uses.
    """

    def __init__(
        self,
        ds_engine,
        zero_stage: int,
        names: dict[torch.nn.Parameter, str],
        shapes: dict[str, tuple[int, ...]],
        objective: Objective,
        mesh: Mesh,
    ):
        self.ds_engine, self.zero = ds_engine, ds_engine.optimizer
        self.zero_stage, self.names, self.shapes = zero_stage, names, shapes
        self.objective, self.mesh = objective, mesh
        self.scaler = self.zero.loss_scaler
        if self.scaler.dynamic:
            self.scaler.raise_error_at_min_scale = False
        self.bad_parameters = torch.zeros(len(names), dtype=torch.bool, device=mesh.device)
        self._watch_gradients()
        init_adam_state(self.zero.optimizer, self._partitions())
        if zero_stage == 2:
            self.zero._lazy_init_hp_params_optimizer_state()

    def train_step(self, micro_batches: Sequence, *, step: int, num_tokens: int, learning_rate: float) -> StepOutput:
        scale = float(self.zero.loss_scale)
        self.bad_parameters.zero_()
        # DeepSpeed averages gradients over the replicas; times dp it is the sum that the mean per token needs.
        own_loss = run_micro_batches(
            self.ds_engine, micro_batches, self.objective, step, self.mesh.layout.dp / num_tokens, self.mesh.device,
            self.ds_engine.backward,
        )
        loss_sum = LossSum(own_loss, self.mesh.dp_group)
        for group in self.zero.optimizer.param_groups:
            group["lr"] = learning_rate
        self.ds_engine.step()
        return describe_step(
            loss_sum, num_tokens, self.zero._global_grad_norm, scale, bool(self.zero.overflow), self.scaler.dynamic,
            self._faults,
        )

    def evaluate(self, batch) -> float:
        return evaluate_batch(self.ds_engine, batch, self.objective, self.mesh.device)

    def state_pieces(self) -> Iterator[StatePiece]:
        if self.zero_stage == 2:
            return linked_pieces([(name, p) for p, name in self.names.items()], owner_rank=0, num_owners=1)
        return self._stage3_pieces()

    def scalars(self) -> dict[str, float]:
        state = self.zero.optimizer.state[next(iter(self._partitions()))]
        return {"step": float(state["step"]), **scaler_values(self.scaler)}

    def restore_scalars(self, scalars: dict[str, float]) -> None:
        for partition in self._partitions():
            self.zero.optimizer.state[partition]["step"].fill_(scalars["step"])
        restore_scaler(self.scaler, scalars)
        with torch.no_grad():
            self._refresh_parameters()

    def _partitions(self) -> list[torch.Tensor]:
        stage2 = self.zero_stage == 2
        return self.zero.single_partition_of_fp32_groups if stage2 else self.zero.fp32_partitioned_groups_flat

    def _stage3_pieces(self) -> Iterator[StatePiece]:
        """Under ZeRO-3 each parameter is cut into dp equal ranges, the last one padded."""
        for parameter, name in self.names.items():
            group, offset, padded = self.zero.grad_position[self.zero.get_param_id(parameter)]
            start = padded * self.mesh.dp_rank
            numel = max(0, min(padded, parameter.ds_numel - start))
            master = self.zero.fp32_partitioned_groups_flat[group]
            moments = self.zero.optimizer.state[master]
            states = {"master": master, **{key: moments[key] for key in MOMENTS}}
            local = {kind: values.detach()[offset : offset + numel] for kind, values in states.items()}
            yield from flat_pieces(name, self.shapes[name], start, numel, local)

    def _refresh_parameters(self) -> None:
        if self.zero_stage == 2:
            self.zero.update_lp_params()
            return
        # Small parameters stay gathered between steps, and their whole copies are stale now: given up, they are
        # gathered anew when they are used.
        self.zero._partition_all_parameters()
        for group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)

    def _watch_gradients(self) -> None:
        """Remembers on the device, without waiting for it, which parameters met a bad gradient on this rank.

        DeepSpeed reduces gradients during the backward pass, so afterwards nobody could say whose it was.
        """
        for index, parameter in enumerate(self.names):
            parameter.register_hook(lambda gradient, index=index: self._note(gradient, index))

    def _note(self, gradient: torch.Tensor, index: int) -> None:
        self.bad_parameters[index] |= ~torch.isfinite(gradient).all()

    def _faults(self, own_loss_is_finite: bool) -> tuple[str, ...]:
        bad = self.bad_parameters.nonzero()
        return gather_faults(self.mesh, own_loss_is_finite, int(bad[0]) if len(bad) else FINITE,
                             list(self.names.values()))
