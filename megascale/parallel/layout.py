"""Rank arithmetic: the only place that knows in which order ranks are laid out.

Ranks are numbered with tp innermost (its traffic wants the fastest links), then cp, then dp, with pp outermost:
`rank = ((pp_rank * dp + dp_rank) * cp + cp_rank) * tp + tp_rank`.

Expert parallelism is no axis of its own: it divides the merged (dp, cp) axis, whose ranks otherwise hold the same
parameters. Along it `ep` neighbours share out the experts, and every ep-th rank holds the same ones.
"""

from dataclasses import dataclass

AXES = ("pp", "dp", "cp", "tp")


@dataclass(frozen=True)
class Layout:
    """The sizes of the parallel axes. The product of all but ep, which divides dp x cp, is the world size.

    >>> layout = Layout(pp=2, dp=2, cp=1, tp=2)
    >>> layout.coordinates(5)
    {'pp': 1, 'dp': 0, 'cp': 0, 'tp': 1}
    >>> layout.ranks_along(("dp",), 5)
    [5, 7]
    >>> Layout(dp=2, cp=2, ep=2).expert_groups()
    [[0, 1], [2, 3]]
    >>> Layout(dp=2, cp=2, ep=2).expert_replica_groups()
    [[0, 2], [1, 3]]
    """

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    @property
    def world_size(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    def coordinates(self, rank: int) -> dict[str, int]:
        """Position of a rank on each axis."""
        position = {}
        for axis in reversed(AXES):
            rank, position[axis] = divmod(rank, getattr(self, axis))
        return {axis: position[axis] for axis in AXES}

    def rank_at(self, coordinates: dict[str, int]) -> int:
        """The rank at a position, the inverse of `coordinates`."""
        rank = 0
        for axis in AXES:
            rank = rank * getattr(self, axis) + coordinates[axis]
        return rank

    def groups_along(self, axes: tuple[str, ...]) -> list[list[int]]:
        """All process groups along the given axes, each ascending; together they hold every rank once."""
        groups: dict[tuple, list[int]] = {}
        for rank in range(self.world_size):
            fixed = tuple(at for axis, at in self.coordinates(rank).items() if axis not in axes)
            groups.setdefault(fixed, []).append(rank)
        return list(groups.values())

    def ranks_along(self, axes: tuple[str, ...], rank: int) -> list[int]:
        """The ranks that differ from `rank` on the given axes only, ascending: the members of its process group."""
        return next(group for group in self.groups_along(axes) if rank in group)

    def expert_groups(self) -> list[list[int]]:
        """Ranks that share out the experts of a layer among themselves, each group ascending; every rank is in one."""
        replicas = self.groups_along(("dp", "cp"))
        return [ranks[first : first + self.ep] for ranks in replicas for first in range(0, len(ranks), self.ep)]

    def expert_replica_groups(self) -> list[list[int]]:
        """Ranks that hold the same experts, each group ascending; every rank is in one."""
        return [ranks[place :: self.ep] for ranks in self.groups_along(("dp", "cp")) for place in range(self.ep)]
