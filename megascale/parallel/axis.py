"""One axis of the mesh as a layer sees it: how many ranks share the work, which of them this is, and their group."""

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class Axis:
    """The ranks along one axis. The default is an axis of one rank: nothing is shared and nothing is sent.

    Attributes:
        size: number of ranks.
        rank: place of this rank among them.
        group: their process group, None for one rank.
        name: the group's registered name, by which traced code refers to it.
        is_gloo: whether the group talks over gloo, whose own reduce-scatter sends twice what it has to.
    """

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    name: str = ""
    is_gloo: bool = False


ALONE = Axis()
"""An axis of one rank."""


def axis_of_group(group: dist.ProcessGroup) -> Axis:
    """The axis that a process group is; a group of one rank gives an axis that sends nothing."""
    size = dist.get_world_size(group)
    if size == 1:
        return ALONE
    return Axis(size, dist.get_rank(group), group, group.group_name, dist.get_backend(group) == "gloo")
