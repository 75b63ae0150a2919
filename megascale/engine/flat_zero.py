"""DeepSpeed's ZeRO-1 optimizer with fp32 main gradients, made to move what theory says and to hold any format.

DeepSpeed's `BF16_Optimizer` keeps each parameter group flat, with an fp32 gradient buffer of the whole group and an
fp32 master and moments of this rank's partition. Three things differ here:

- Gradients are reduce-scattered; DeepSpeed all-reduces them (DeepSpeed issue 6463), twice the traffic.
- Parameters may be fp32 or fp16 too. In fp32 the gradients are accumulated by autograd in the flat buffer itself and
  the master is the parameter, so neither costs a copy.
- Over a group of one rank it is ZeRO-0: nothing is partitioned, and gradients are all-reduced. DeepSpeed's own stage 0
  takes a spurious first step in bf16 and reports no gradient norm.
"""

from collections.abc import Callable
from math import inf
from types import SimpleNamespace

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

from megascale.engine.fragments import init_adam_state

NORM_PIECE_ELEMENTS = 4096
FINITE = -1
"""In place of a parameter's index: its gradients are all finite."""


class FlatZeroOptimizer(BF16_Optimizer):
    """ZeRO-0 or ZeRO-1 over flat parameter groups.

    Args:
        optimizer: AdamW over the model's parameters, which this optimizer takes over.
        names: name of each parameter.
        reduce_group: ranks over which gradients are summed.
        partition_group: ranks that share out optimizer state: `reduce_group` for ZeRO-1, this rank alone for ZeRO-0.
        clip_norm: largest gradient norm, 0 for none.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        names: dict[torch.nn.Parameter, str],
        reduce_group: dist.ProcessGroup,
        partition_group: dist.ProcessGroup,
        clip_norm: float,
    ):
        self.is_fp32 = next(iter(names)).dtype == torch.float32
        self.reduce_group = reduce_group
        super().__init__(
            optimizer,
            names,
            bfloat16_config=SimpleNamespace(enabled=True, immediate_grad_update=not self.is_fp32),
            clip_grad=clip_norm,
            dp_process_group=partition_group,
            grad_acc_dtype=torch.float32,
        )
        self.is_partitioned = dist.get_world_size(partition_group) > 1
        self.parameters = [parameter for group in self.bf16_groups for parameter in group]
        self.largest_gradients: torch.Tensor | None = None
        if self.is_partitioned:
            self.mpu = SimpleNamespace(get_model_parallel_group=lambda: reduce_group)
            self.fp32_groups_gradient_flat_partition = [
                torch.empty_like(part) for part in self.fp32_groups_gradient_flat_partition
            ]
        if self.is_fp32:
            self._accumulate_in_place()
        init_adam_state(optimizer, self.fp32_groups_flat_partition)
        self._lazy_init_hp_params_optimizer_state()

    def reduce_gradients(self, unscale: float) -> None:
        """Sums gradients over the replicas into this rank's partition and multiplies them by `unscale`.

        Cost: 4 bytes x parameters x (n-1)/n sent by each rank (reduce-scatter), twice that for ZeRO-0 (all-reduce).
        """
        self.largest_gradients = None
        wholes, partitions = self.fp32_groups_gradients_flat, self.fp32_groups_gradient_flat_partition
        waits: list[Callable[[], object]] = []
        if self.is_partitioned:
            pairs = zip(wholes, partitions, strict=True)
            waits = [start_reduce_scatter(whole, partition, self.reduce_group) for whole, partition in pairs]
        elif dist.get_world_size(self.reduce_group) > 1:
            self._note_largest_gradients()  # the sum takes the place of this rank's own gradients
            waits = [dist.all_reduce(whole, group=self.reduce_group, async_op=True).wait for whole in wholes]
        for wait in waits:
            wait()
        if unscale != 1.0:
            for partition in partitions:
                partition.mul_(unscale)

    def get_grads_for_norm(self, for_clipping: bool = False):
        """This rank's partitions, or their norms piece by piece: all ranks' together have the whole gradient's norm.

        Piece by piece, since one fp32 sum over millions of squares loses the last digits.
        """
        partitions = list(self.fp32_groups_gradient_flat_partition)
        return partitions if for_clipping else ([piece_norms(partition) for partition in partitions], {})

    def clear_hp_grads(self) -> None:
        """Zeroes the gradients; after an overflow, notes first how large this rank's own were."""
        if self.overflow and self.largest_gradients is None:
            self._note_largest_gradients()
        for whole in self.fp32_groups_gradients_flat:
            whole.zero_()

    def first_nonfinite(self) -> int:
        """Index in `parameters` of the first whose gradient on this rank wasn't finite in a skipped step, or -1."""
        bad = (~torch.isfinite(self.largest_gradients)).nonzero()
        return int(bad[0]) if len(bad) else FINITE

    def update_lp_params(self) -> None:
        """Casts the masters to parameters where they are two things, and gathers all partitions on every rank."""
        partitions = [group[self.dp_rank] for group in self.bf16_partitioned_groups]
        if not self.is_fp32:
            for partition, master in zip(partitions, self.fp32_groups_flat_partition, strict=True):
                partition.copy_(master)
        if self.is_partitioned:
            gathers = [
                dist.all_gather_into_tensor(whole, partition, group=self.reduce_group, async_op=True)
                for whole, partition in zip(self.bf16_groups_flat, partitions, strict=True)
            ]
            for gather in gathers:
                gather.wait()

    def _link_all_hp_params(self) -> None:
        if self.is_fp32:
            self._use_parameters_as_masters()
        super()._link_all_hp_params()

    def _use_parameters_as_masters(self) -> None:
        for index, partitions in enumerate(self.bf16_partitioned_groups):
            master = partitions[self.dp_rank].detach().requires_grad_()
            self.fp32_groups_flat_partition[index] = master
            self.optimizer.param_groups[index]["params"] = [master]

    def _accumulate_in_place(self) -> None:
        for parameters, gradients in zip(self.bf16_groups, self.fp32_groups_gradients, strict=True):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.view_as(parameter)

    def _note_largest_gradients(self) -> None:
        """Notes the largest magnitude in each parameter's gradient, NaN where one is NaN, without waiting for it."""
        gradients = [gradient for group in self.fp32_groups_gradients for gradient in group]
        self.largest_gradients = torch.stack([torch.linalg.vector_norm(gradient, inf) for gradient in gradients])


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
