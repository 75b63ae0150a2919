"""Brings the parts of a flat group together into whole tensors, for optimizers that need them, and takes own parts."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from megascale.engine.base import StatePiece
from megascale.engine.flat_ranges import Range, flat_ranges
from megascale.optim.state import FACTORS, new_factors
from megascale.optim.whole import WholeTensor
from megascale.parallel.axis import Axis
from megascale.parallel.boxes import Box
from megascale.parallel.placement import Placement


class GatheredTensors:
    """The parameters of a flat group that this rank's partition meets; see `megascale.optim.whole.WholeTensors`.

    Ranks of the tp axis that share a tensor hold equally long parts of it at equal places of their groups, so they meet
    the same ones, and go through them in one order.

    Args:
        parameters: of the group, in its order.
        whole, part: its flat gradients, and this rank's partition within them.
        start: where in `whole` the partition begins.
        group: the ranks that share out the partitions.
        tp: the ranks that share matrices.
        has_factors: whether the optimizer keeps factors of its matrices.

    Cost: a step sends 4 bytes x elements x (n-1)/n over the group, and for what tp cuts 4 bytes x elements of the whole
        x (t-1)/t over tp, by each rank whose partition meets it. A matrix that a border between two partitions cuts is
        worked on by both, and by every tp rank. In memory one whole matrix at a time; the group's gather takes place in
        the gradient buffer, which is there anyway.
    """

    def __init__(
        self, parameters: Sequence[torch.nn.Parameter], placements: Mapping[torch.nn.Parameter, Placement],
        whole: torch.Tensor, part: torch.Tensor, start: int, group: dist.ProcessGroup, tp: Axis,
        *, has_factors: bool,
    ):
        self.whole, self.part, self.group, self.tp = whole, part, group, tp
        self.entries: list[tuple[WholeTensor, Placement, Range, bool]] = []
        own = [placements[parameter] for parameter in parameters]
        for parameter, placement, (first, stop) in zip(parameters, own, flat_ranges(own), strict=True):
            if first >= start + len(part) or stop <= start:
                continue
            num_inner = 2 if parameter.dim() >= 2 else 1
            shape = (*placement.box.shape[:-num_inner], *placement.global_shape[-num_inner:])
            tensor = WholeTensor(placement.name, shape, self._reader(parameter, placement))
            if has_factors:
                tensor.state.update(new_factors(shape, part))
            begins_here = start <= first
            self.entries.append((tensor, placement, (first, stop), begins_here))

    def __iter__(self) -> Iterator[WholeTensor]:
        return (tensor for tensor, *_ in self.entries)

    def replace_gradients(self, update: Callable[[WholeTensor, torch.Tensor], None]) -> None:
        if dist.get_world_size(self.group) > 1:
            dist.all_gather_into_tensor(self.whole, self.part, group=self.group)
        for tensor, placement, (first, stop), _ in self.entries:
            own = self.whole[first:stop].view(placement.box.shape)
            gathered = gather_cut(own, placement, self.tp)
            update(tensor, gathered)
            if gathered is not own:
                own.copy_(gathered[inner_slices(placement)])

    def pieces(self, share: int) -> Iterator[StatePiece]:
        """Pieces of what is kept of each whole tensor. One rank owns each; the others hold a copy, for their own use.

        Args:
            share: which of the ranks that hold the same partition this one is.
        """
        for tensor, placement, _, begins_here in self.entries:
            box = placement.box
            is_first = all(start == 0 for start in box.starts[-2:])
            for kind, values in tensor.state.items():
                kept = [dim for dim in range(len(box.starts)) if dim - len(box.starts) != FACTORS[kind]]
                starts, stops = list(box.starts), list(box.stops)
                for dim in range(len(starts))[-2:]:
                    starts[dim], stops[dim] = 0, placement.global_shape[dim]
                yield StatePiece(
                    f"{kind}/{placement.name}",
                    tuple(placement.global_shape[dim] for dim in kept),
                    Box(tuple(starts[dim] for dim in kept), tuple(stops[dim] for dim in kept)),
                    values.view(-1),
                    is_owner=placement.is_counted and is_first and begins_here and share == 0,
                )

    def _reader(self, parameter: torch.nn.Parameter, placement: Placement) -> Callable[[], torch.Tensor]:
        return lambda: gather_cut(parameter.detach(), placement, self.tp)


def cut_dim(placement: Placement) -> int | None:
    """The dim of a matrix, or of a vector, that tp cuts, counted from the end; None where it is whole."""
    num_inner = min(2, len(placement.global_shape))
    cut = [dim for dim in range(-num_inner, 0) if placement.box.shape[dim] != placement.global_shape[dim]]
    return cut[0] if cut else None


def gather_cut(own: torch.Tensor, placement: Placement, tp: Axis) -> torch.Tensor:
    """A tensor of which each tp rank has a part, whole; itself where this rank has the whole."""
    dim = cut_dim(placement)
    if dim is None:
        return own
    own = own.contiguous()
    gathered = own.new_empty((tp.size, *own.shape))
    dist.all_gather_into_tensor(gathered.view(-1), own.view(-1), group=tp.group)
    return torch.cat(gathered.unbind(0), dim=dim)


def inner_slices(placement: Placement) -> tuple[slice | type(Ellipsis), ...]:
    """Index of this rank's part into what `gather_cut` gives."""
    num_inner = min(2, len(placement.global_shape))
    return (Ellipsis, *placement.box.slices[-num_inner:])
