"""DeepSpeed's ZeRO-1 optimizer with fp32 main gradients, made to move what theory says and to hold any format.

DeepSpeed's `BF16_Optimizer` keeps each parameter group flat, with an fp32 gradient buffer of the whole group and an
fp32 master and moments of this rank's partition. Three things differ here:

- Gradients are reduce-scattered; DeepSpeed all-reduces them (DeepSpeed issue 6463), twice the traffic.
- Parameters may be fp32 or fp16 too. In fp32 the gradients are accumulated by autograd in the flat buffer itself and
  the master is the parameter, so neither costs a copy.
- Over a group of one rank it is ZeRO-0: nothing is partitioned, and gradients are all-reduced. DeepSpeed's own stage 0
  takes a spurious first step in bf16 and reports no gradient norm.
- Each parameter group has ranks of its own that hold the same: experts have fewer replicas than the rest.
"""

from collections.abc import Callable, Mapping, Sequence
from math import inf
from types import SimpleNamespace

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

from megascale.engine.flat_ranges import flat_order, ranges_within, summed_runs
from megascale.engine.fragments import init_state
from megascale.engine.replicas import Replicas
from megascale.engine.whole_tensors import GatheredTensors
from megascale.parallel.axis import ALONE, Axis
from megascale.parallel.placement import Placement

NORM_PIECE_ELEMENTS = 4096


class FlatZeroOptimizer(BF16_Optimizer):
    """ZeRO-0 or ZeRO-1 over flat parameter groups.

    Args:
        optimizer: works on the model's parameters, which this optimizer takes over. Groups may be empty, but all
            ranks have equally many.
        placements: where each parameter lies in the whole model.
        replicas: of each parameter group, who holds the same part of it.
        norm_group: ranks whose counted gradients together are the whole model's.
        clip_norm: largest gradient norm, 0 for none.
        is_offloaded: whether masters, moments and the update live in CPU memory.
        tp: the ranks that share matrices, for optimizers that need them whole.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        placements: Mapping[torch.nn.Parameter, Placement],
        replicas: Sequence[Replicas],
        norm_group: dist.ProcessGroup,
        clip_norm: float,
        is_offloaded: bool = False,
        tp: Axis = ALONE,
    ):
        example = next(iter(placements))
        self.dtype, self.device = example.dtype, example.device
        self.is_fp32, self.is_offloaded = self.dtype == torch.float32, is_offloaded
        self.placements, self.replicas = placements, replicas
        for group in optimizer.param_groups:
            own = [placements[parameter] for parameter in group["params"]]
            order = flat_order(own, counted_first=not group.get("needs_whole"))
            group["params"] = [group["params"][index] for index in order]
        super().__init__(
            optimizer,
            {parameter: placement.name for parameter, placement in placements.items()},
            bfloat16_config=SimpleNamespace(enabled=True, immediate_grad_update=not self.is_fp32),
            clip_grad=clip_norm,
            dp_process_group=replicas[0].partition_group,
            grad_acc_dtype=torch.float32,
        )
        if dist.get_world_size(norm_group) > 1:
            self.mpu = SimpleNamespace(get_model_parallel_group=lambda: norm_group)
        self.reduced = list(self.fp32_groups_gradient_flat_partition)  # parts of the flat buffers: the sum is in place
        self.fp32_groups_gradient_flat_partition = [self._on_host(part) for part in self.reduced]
        self._plan_sums_and_norm()
        if self.is_fp32:
            self._accumulate_in_place()
        if is_offloaded:
            optimizer.register_step_pre_hook(self._bring_gradients)
        init_state(optimizer, zip(self.fp32_groups_flat_partition, optimizer.param_groups, strict=True))
        self.gathered = [self._gather_tensors(index, tp) for index in range(len(optimizer.param_groups))]
        self._lazy_init_hp_params_optimizer_state()

    def add_gradient(self, parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
        """Adds to a parameter's fp32 gradient what a pipeline schedule computed later than autograd's pass."""
        self.main_gradients[parameter].add_(gradient)

    def _update_hp_grad(self, lp, group_idx: int, param_idx: int, clear_lp_grads: bool) -> None:
        """Adds a 16-bit gradient to the fp32 one in one pass; DeepSpeed's makes an fp32 copy of it first."""
        if lp.grad is not None:
            main = self.fp32_groups_gradients[group_idx][param_idx]
            lp._hp_grad = main.add_(lp.grad.view(main.shape))
            self.fp32_groups_has_gradients[group_idx][param_idx] = True
            if clear_lp_grads:
                lp.grad.zero_()

    def reduce_gradients(self, unscale: float) -> None:
        """Sums gradients over the replicas into this rank's partition and multiplies them by `unscale`.

        What each rank of an axis has only a part of is summed over that axis first, in place: afterwards the flat
        buffers of a pipeline's two ends are cut up differently.

        Cost: 4 bytes x parameters x (n-1)/n sent by each rank (reduce-scatter), twice that for ZeRO-0 (all-reduce);
        for partial gradients 8 bytes x parameters x (n-1)/n over the axis more.
        """
        self.largest = self._largest_gradients(self.noted_early)
        partial_sums = [
            [dist.all_reduce(run, group=axis.group, async_op=True) for axis, run in runs] for runs in self.partial_runs
        ]
        waits: list[Callable[[], object]] = []
        for whole, partition, sums, replicas in zip(
            self.fp32_groups_gradients_flat, self.reduced, partial_sums, self.replicas, strict=True
        ):
            for partial_sum in sums:
                partial_sum.wait()
            if replicas.is_partitioned:
                waits.append(start_reduce_scatter(whole, partition, replicas.reduce_group))
            elif replicas.is_shared:
                waits.append(dist.all_reduce(whole, group=replicas.reduce_group, async_op=True).wait)
        for wait in waits:
            wait()
        if unscale != 1.0:
            for partition in self.reduced:
                partition.mul_(unscale)

    def get_grads_for_norm(self, for_clipping: bool = False):
        """This rank's partitions, or their norms piece by piece: all ranks' together have the whole gradient's norm.

        Piece by piece, since one fp32 sum over millions of squares loses the last digits. What another rank counts is
        worth nothing here, unless it isn't finite (0 x inf = NaN): then every rank must skip the step.
        """
        if for_clipping:
            return list(self.reduced)
        return [piece_norms(part) for part in self.counted] + [0.0 * piece_norms(part) for part in self.uncounted], {}

    def clear_hp_grads(self) -> None:
        """Zeroes the gradients; after an overflow, notes first how large this rank's own were."""
        if self.overflow:
            self.largest |= self._largest_gradients([i for i in range(len(self.parameters)) if i not in self.largest])
        for whole in self.fp32_groups_gradients_flat:
            whole.zero_()

    def first_nonfinite(self) -> str | None:
        """Name of the first parameter whose gradient on this rank wasn't finite in a skipped step."""
        bad = [index for index, largest in sorted(self.largest.items()) if not torch.isfinite(largest)]
        return self.placements[self.parameters[bad[0]]].name if bad else None

    def update_lp_params(self) -> None:
        """Casts the masters to parameters where they are two things, and gathers all partitions on every rank."""
        partitions = [
            parts[replicas.part] for parts, replicas in zip(self.bf16_partitioned_groups, self.replicas, strict=True)
        ]
        if not self.is_fp32 or self.is_offloaded:
            for partition, master in zip(partitions, self.fp32_groups_flat_partition, strict=True):
                partition.copy_(master)
        gathers = [
            dist.all_gather_into_tensor(whole, partition, group=replicas.partition_group, async_op=True)
            for whole, partition, replicas in zip(self.bf16_groups_flat, partitions, self.replicas, strict=True)
            if replicas.is_partitioned
        ]
        for gather in gathers:
            gather.wait()

    def _setup_for_real_optimizer(self) -> None:
        """Tells DeepSpeed of each group's own ranks before it cuts the groups up."""
        self.real_dp_process_group = [replicas.partition_group for replicas in self.replicas]
        super()._setup_for_real_optimizer()

    def _link_all_hp_params(self) -> None:
        for index, partitions in enumerate(self.bf16_partitioned_groups):
            master = self.fp32_groups_flat_partition[index]
            if self.is_fp32 and not self.is_offloaded:
                master = partitions[self.replicas[index].part]
            master = self._on_host(master.detach()).requires_grad_()
            self.fp32_groups_flat_partition[index] = master
            self.optimizer.param_groups[index]["params"] = [master]
        super()._link_all_hp_params()

    def _gather_tensors(self, index: int, tp: Axis) -> GatheredTensors | None:
        """Hands a group its tensors as wholes, where its optimizer needs them."""
        group, replicas, part = self.optimizer.param_groups[index], self.replicas[index], self.reduced[index]
        if not group.get("needs_whole"):
            return None
        group["whole_tensors"] = GatheredTensors(
            self.bf16_groups[index], self.placements, self.fp32_groups_gradients_flat[index], part,
            replicas.part * len(part), replicas.partition_group, tp, has_factors=group["has_factors"],
        )
        return group["whole_tensors"]

    def _plan_sums_and_norm(self) -> None:
        """Finds, once, the parts of the gradient buffers that are summed over an axis, counted, and noted early."""
        self.parameters = [parameter for group in self.bf16_groups for parameter in group]
        gradients = [gradient for group in self.fp32_groups_gradients for gradient in group]
        self.main_gradients = {
            parameter: gradient.view_as(parameter)
            for parameter, gradient in zip(self.parameters, gradients, strict=True)
        }
        self.partial_runs, self.counted, self.uncounted = [], [], []
        summed: set[torch.nn.Parameter] = set()
        for parameters, whole, part, replicas in zip(
            self.bf16_groups, self.fp32_groups_gradients_flat, self.reduced, self.replicas, strict=True
        ):
            placements = [self.placements[parameter] for parameter in parameters]
            self.partial_runs.append([(axis, whole[slice(*run)]) for axis, run in summed_runs(placements)])
            start = replicas.part * len(part)
            for parts, is_counted in ((self.counted if replicas.counts else self.uncounted, True),
                                      (self.uncounted, False)):
                ranges = ranges_within(placements, (start, start + len(part)), is_counted=is_counted)
                parts.extend(part[slice(*within)] for within in ranges)
            if replicas.is_shared:
                summed.update(parameter for parameter in parameters if self._lies_in(parameter, part))
        self.counted = self.counted or [self.reduced[0][:0]]
        self.noted_early = [
            index for index, parameter in enumerate(self.parameters)
            if self.placements[parameter].partial_over.size > 1 or parameter in summed
        ]
        self.largest: dict[int, torch.Tensor] = {}

    def _lies_in(self, parameter: torch.nn.Parameter, part: torch.Tensor) -> bool:
        """Whether a sum over the replicas into `part` takes the place of some of this rank's own gradient."""
        main = self.main_gradients[parameter]
        return part.data_ptr() < main.data_ptr() + main.nbytes and main.data_ptr() < part.data_ptr() + part.nbytes

    def _accumulate_in_place(self) -> None:
        for parameter, gradient in self.main_gradients.items():
            parameter.grad = gradient

    def _largest_gradients(self, indices: Sequence[int]) -> dict[int, torch.Tensor]:
        """The largest magnitude in some parameters' gradients, NaN where one is NaN, without waiting for it.

        Noted before a sum takes the place of this rank's own gradients.
        """
        if not indices:
            return {}
        gradients = [self.main_gradients[self.parameters[index]] for index in indices]
        return dict(zip(indices, torch._foreach_norm(gradients, inf), strict=True))

    def _on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself, or with offload a copy in CPU memory, from which a GPU reads without a detour."""
        if not self.is_offloaded:
            return tensor
        return torch.empty_like(tensor, device="cpu", pin_memory=self.device.type == "cuda").copy_(tensor)

    def _bring_gradients(self, *_) -> None:
        """With offload, copies the clipped gradients to where AdamW is about to use them; a skipped step has none."""
        for host, reduced in zip(self.fp32_groups_gradient_flat_partition, self.reduced, strict=True):
            host.copy_(reduced)

    def _flatten_dense_tensors_aligned(self, tensors: list[torch.Tensor], alignment: int) -> torch.Tensor:
        """Also of no tensors: a pipeline stage without norms has an empty group, of padding only."""
        if not tensors:
            return torch.zeros(alignment, dtype=self.dtype, device=self.device)
        return super()._flatten_dense_tensors_aligned(tensors, alignment)


def piece_norms(flat: torch.Tensor) -> torch.Tensor:
    """L2 norms of consecutive pieces of a flat tensor, the last one shorter."""
    num_even = len(flat) // NORM_PIECE_ELEMENTS * NORM_PIECE_ELEMENTS
    even, rest = flat[:num_even].view(-1, NORM_PIECE_ELEMENTS), flat[num_even:]
    return torch.cat([torch.linalg.vector_norm(even, dim=1), torch.linalg.vector_norm(rest)[None]])


def start_reduce_scatter(
    whole: torch.Tensor, partition: torch.Tensor, group: dist.ProcessGroup
) -> Callable[[], object]:
    """Starts to sum `whole` over the ranks, each rank's share of it into its `partition`.

    Gloo's own reduce-scatter is an all-reduce of a copy. An all-to-all and a sum send half of that.

    Returns:
        What waits until `partition` holds the sum.
    """
    if dist.get_backend(group) != "gloo":
        return dist.reduce_scatter_tensor(partition, whole, group=group, async_op=True).wait
    received = torch.empty_like(whole)
    exchange = dist.all_to_all_single(received, whole, group=group, async_op=True)

    def finish() -> None:
        exchange.wait()
        torch.sum(received.view(-1, len(partition)), dim=0, out=partition)

    return finish
