"""Which ranks hold the same part of a parameter group: over them gradients are summed and state is shared out."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import compress

import torch
import torch.distributed as dist

from megascale.parallel.mesh import Mesh
from megascale.parallel.placement import Placement


@dataclass(frozen=True)
class Replicas:
    """The ranks that hold the same part of a parameter group as this rank.

    Attributes:
        reduce_group: all of them; gradients are summed over it.
        partition_group: those that share out optimizer state: `reduce_group` for ZeRO-1, this rank alone for ZeRO-0.
        counts: whether the gradient norm, which sums over more ranks than one of each, counts this rank's gradients.
    """

    reduce_group: dist.ProcessGroup
    partition_group: dist.ProcessGroup
    counts: bool = True

    @property
    def is_shared(self) -> bool:
        """Whether other ranks hold the same."""
        return dist.get_world_size(self.reduce_group) > 1

    @property
    def is_partitioned(self) -> bool:
        """Whether optimizer state is shared out."""
        return dist.get_world_size(self.partition_group) > 1

    @property
    def part(self) -> int:
        """Which part of the optimizer state this rank has."""
        return dist.get_rank(self.partition_group)

    @property
    def share(self) -> tuple[int, int]:
        """Which share of its own state this rank writes to a checkpoint, and of how many; all of it where no other
        rank has the same."""
        if self.is_partitioned:
            return 0, 1
        return dist.get_rank(self.reduce_group), dist.get_world_size(self.reduce_group)


def divide_groups(
    optimizer: torch.optim.Optimizer, placements: Mapping[torch.nn.Parameter, Placement], mesh: Mesh, zero_stage: int
) -> list[Replicas]:
    """Parts experts from the rest of each parameter group, and says who holds each group.

    Experts that are cut over the ep ranks have fewer replicas: a rank's experts have seen the tokens of all its ep
    peers, so their gradients are summed over `Mesh.expert_group` only. All ranks get the same number of groups, empty
    ones among them.

    Args:
        optimizer: its groups are divided in place. Without expert parallelism they stay as they are.
    """
    everyone = _replicas(mesh, mesh.zero_group, zero_stage)
    if mesh.ep.size == 1:
        return [everyone] * len(optimizer.param_groups)
    num_groups = len(optimizer.param_groups)
    optimizer.param_groups = [
        group | _chosen(group, [placements[parameter].is_expert is is_expert for parameter in group["params"]])
        for group in optimizer.param_groups
        for is_expert in (False, True)
    ]
    return [everyone, _replicas(mesh, mesh.expert_group, zero_stage)] * num_groups


def _chosen(group: dict, is_chosen: list[bool]) -> dict[str, list]:
    """Some of a group's parameters, with their names where it has them."""
    return {key: list(compress(group[key], is_chosen)) for key in ("params", "names") if key in group}


def norm_group(mesh: Mesh, zero_stage: int) -> dist.ProcessGroup:
    """Ranks whose counted gradients together are the whole model's: all where any of its state is spread over replicas,
    else those of one replica."""
    return mesh.world_group if zero_stage == 1 or mesh.ep.size > 1 else mesh.model_group


def _replicas(mesh: Mesh, group: dist.ProcessGroup, zero_stage: int) -> Replicas:
    if zero_stage == 1:
        return Replicas(group, group)
    return Replicas(group, mesh.self_group, counts=mesh.ep.size == 1 or dist.get_rank(group) == 0)
