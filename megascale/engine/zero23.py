"""The engine of ZeRO-2 and ZeRO-3: DeepSpeed's own engine, which shares out gradients and parameters too."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist

from megascale.engine.base import Engine, Objective, StatePiece, StepOutput
from megascale.engine.fragments import flat_pieces, init_state, linked_pieces, swap_average
from megascale.engine.micro_batches import LossSum, MicroBatchRunner, describe_step, gather_faults, own_share
from megascale.engine.precision import restore_scaler, scaler_values
from megascale.parallel.axis import Axis
from megascale.parallel.collectives import start_all_reduce
from megascale.parallel.mesh import Mesh
from megascale.parallel.placement import Placement


class PartitionedGradientEngine(Engine):
    """Drives a DeepSpeed engine of stage 2 or 3, and knows where it keeps its state.

    Args:
        ds_engine: what `deepspeed.initialize` returned.
        placements: where each parameter lies in the whole model, in the model's order. Under ZeRO-3 a parameter
            itself is empty between uses.
    """

    def __init__(
        self,
        ds_engine,
        zero_stage: int,
        placements: Mapping[torch.nn.Parameter, Placement],
        objective: Objective,
        mesh: Mesh,
    ):
        self.ds_engine, self.zero = ds_engine, ds_engine.optimizer
        self.zero_stage, self.placements, self.mesh = zero_stage, placements, mesh
        self.runner = MicroBatchRunner(
            ds_engine, objective, mesh.device, ds_engine.backward, lambda: float(self.zero.loss_scale)
        )
        self.scaler = self.zero.loss_scaler
        if self.scaler.dynamic:
            self.scaler.raise_error_at_min_scale = False
        self.bad_parameters = torch.zeros(len(placements), dtype=torch.bool, device=mesh.device)
        self._watch_gradients()
        if mesh.tp.size > 1 and not self.scaler.dynamic:
            self._check_uncounted_gradients()
        # Groups differ in their constants and not in what is kept; ZeRO-3 has more partitions than groups.
        group = self.zero.optimizer.param_groups[0]
        init_state(self.zero.optimizer, [(partition, group) for partition in self._partitions()])
        if zero_stage == 2:
            self.zero._lazy_init_hp_params_optimizer_state()

    def train_step(self, micro_batches: Sequence, *, step: int, num_tokens: int, learning_rate: float) -> StepOutput:
        scale = float(self.zero.loss_scale)
        self.bad_parameters.zero_()
        # DeepSpeed averages gradients over its group; times its size it is the sum that the mean per token needs.
        own_loss = self.runner.run(micro_batches, step, dist.get_world_size(self.mesh.zero_group) / num_tokens)
        loss_sum = LossSum(own_loss, self.mesh.loss_group)
        for group in self.zero.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_factor", 1.0)
        self.ds_engine.step()
        # `compute_s` stays 0: it reduces during the backward pass, so no stretch of the step is this rank's alone.
        return describe_step(
            loss_sum, num_tokens, self.zero._global_grad_norm, scale, bool(self.zero.overflow), self.scaler.dynamic,
            self._faults,
        )

    def evaluate(self, batches: Sequence) -> float:
        return own_share(self.runner.evaluate(batches), self.mesh)

    def state_pieces(self) -> Iterator[StatePiece]:
        if self.zero_stage == 2:
            return linked_pieces(self.placements)
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

    def swap_average(self) -> None:
        swap_average(self.zero.optimizer, self._partitions())
        with torch.no_grad():
            self._refresh_parameters()

    def _partitions(self) -> list[torch.Tensor]:
        stage2 = self.zero_stage == 2
        return self.zero.single_partition_of_fp32_groups if stage2 else self.zero.fp32_partitioned_groups_flat

    def _stage3_pieces(self) -> Iterator[StatePiece]:
        """Under ZeRO-3 each parameter is cut into equal ranges, one a rank of the zero group, the last one padded."""
        rank = dist.get_rank(self.mesh.zero_group)
        for parameter, placement in self.placements.items():
            group, offset, padded = self.zero.grad_position[self.zero.get_param_id(parameter)]
            start = padded * rank
            numel = max(0, min(padded, parameter.ds_numel - start))
            master = self.zero.fp32_partitioned_groups_flat[group]
            moments = self.zero.optimizer.state[master]
            states = {"master": master} | {kind: each for kind, each in moments.items() if each.shape == master.shape}
            local = {kind: values.detach()[offset : offset + numel] for kind, values in states.items()}
            yield from flat_pieces(placement, start, numel, local)

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

        DeepSpeed reduces gradients during the backward pass, so afterwards nobody could say whose it was. What each
        rank of an axis has only a part of is then summed over it. Both are tensor hooks, in this order: they see the
        gradient before it is accumulated, and DeepSpeed's own hooks run after that.
        """
        for index, (parameter, placement) in enumerate(self.placements.items()):
            parameter.register_hook(partial(self._note, index=index))
            if placement.partial_over.size > 1:
                parameter.register_hook(partial(sum_over, axis=placement.partial_over))

    def _check_uncounted_gradients(self) -> None:
        """Makes DeepSpeed look for bad values on all tp ranks in fp32 and bf16 too, as it does in fp16.

        Otherwise it only looks at the norm, and not every tp rank's copy of a parameter counts in that: one that met a
        bad value on its own would train on apart from its peers.

        Cost: a pass over this rank's gradients and a wait for the device, once a step.
        """
        if self.zero_stage == 2:
            self.zero.check_grad_overflow = True
        else:
            self.zero._overflow_check_and_loss_scale_update = lambda update_scale: self.zero.check_overflow()

    def _note(self, gradient: torch.Tensor, index: int) -> None:
        self.bad_parameters[index] |= ~torch.isfinite(gradient).all()

    def _faults(self, own_loss_is_finite: bool) -> tuple[str, ...]:
        bad = self.bad_parameters.nonzero()
        names = [placement.name for placement in self.placements.values()]
        return gather_faults(self.mesh, own_loss_is_finite, names[int(bad[0])] if len(bad) else None)


def sum_over(gradient: torch.Tensor, axis: Axis) -> torch.Tensor:
    """A gradient summed over an axis in fp32.

    Cost: 8 bytes x elements x (n-1)/n sent by each rank, in every micro-batch: DeepSpeed reduces in each of them too.
    """
    return start_all_reduce(gradient.float(), axis)().to(gradient.dtype)


def mark_counted(placements: Mapping[torch.nn.Parameter, Placement]) -> None:
    """Marks for DeepSpeed's gradient norm what this rank counts.

    DeepSpeed counts all on the first rank of the model-parallel group, and what is marked on the others. The mark may
    be either of two attributes; here it is one, true where this rank counts the parameter, so that each element counts
    once whether it is cut, repeated on all tp ranks or on some of them.
    """
    for parameter, placement in placements.items():
        parameter.model_parallel = placement.is_counted


def model_parallel_unit(mesh: Mesh) -> SimpleNamespace:
    """The process groups as DeepSpeed asks for them: tp is its model parallelism, dp x cp its data parallelism.

    It isn't told of cp: declared as sequence parallelism, its ZeRO-3 partitions over dp but reduces over dp x cp.
    """
    replicas, model = mesh.zero_group, mesh.model_group
    return SimpleNamespace(
        get_data_parallel_group=lambda: replicas,
        get_data_parallel_rank=lambda: dist.get_rank(replicas),
        get_data_parallel_world_size=lambda: dist.get_world_size(replicas),
        get_model_parallel_group=lambda: model,
        get_model_parallel_rank=lambda: dist.get_rank(model),
        get_model_parallel_world_size=lambda: dist.get_world_size(model),
        get_tensor_model_parallel_group=lambda: model,
        get_tensor_model_parallel_rank=lambda: dist.get_rank(model),
        get_tensor_model_parallel_world_size=lambda: dist.get_world_size(model),
    )
