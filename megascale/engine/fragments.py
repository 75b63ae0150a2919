"""Where DeepSpeed's ZeRO optimizers keep each parameter's fp32 state, told in global coordinates.

DeepSpeed flattens each parameter group and gives every rank one range of it. Its `_hp_mapping` on a parameter links the
part that lives here to views of the master weight and the moments.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import add

import torch

from megascale.engine.base import StatePiece
from megascale.optim.state import ADAMW_KINDS, EMA, new_state
from megascale.parallel.boxes import Box, boxes_of_flat_range
from megascale.parallel.placement import Placement


def init_state(optimizer: torch.optim.Optimizer, partitions: Iterable[tuple[torch.Tensor, dict]]) -> None:
    """Makes the optimizer's state now rather than at the first step, so that a checkpoint can be loaded into it.

    Args:
        partitions: each with its parameter group.
    """
    for partition, group in partitions:
        device = partition.device if group.get("fused") else "cpu"
        optimizer.state[partition] = new_state(partition, group.get("state_kinds", ADAMW_KINDS), device)


def swap_average(optimizer: torch.optim.Optimizer, partitions: Iterable[torch.Tensor]) -> None:
    """Lets masters and their average change places.

    Cost: a copy of one partition at a time.
    """
    for partition in partitions:
        average = optimizer.state[partition][EMA]
        weights = partition.detach().clone()
        partition.data.copy_(average)
        average.copy_(weights)


def linked_pieces(
    placements: Mapping[torch.nn.Parameter, Placement], shares: Sequence[tuple[int, int]] | None = None
) -> Iterator[StatePiece]:
    """Pieces of parameters whose optimizer keeps them linked (ZeRO 0, 1, 2).

    Args:
        shares: of each parameter group, which share of each range this rank writes, and of how many, where several
            ranks hold the same range. None: the ranges are disjoint.
    """
    for parameter, placement in placements.items():
        fragment = parameter._hp_mapping
        if fragment is None:
            continue
        states = {"master": fragment.hp_fragment, **fragment.optim_fragment}
        address = fragment.lp_fragment_address
        share = shares[fragment.param_group_index] if shares else (0, 1)
        yield from flat_pieces(placement, address.start, address.numel, states, *share)


def flat_pieces(
    placement: Placement, start: int, numel: int, states: dict[str, torch.Tensor], share: int = 0, num_shares: int = 1
) -> Iterator[StatePiece]:
    """Pieces of the flat range [start, start + numel) of one parameter, one per box and kind of state.

    The range counts elements of this rank's part; its boxes are shifted to where that part lies in the whole.
    """
    name, origin = placement.name, placement.box.starts
    for number in range(num_shares):
        share_start, share_stop = (start + numel * edge // num_shares for edge in (number, number + 1))
        is_owner, offset = placement.is_counted and number == share, share_start - start
        for box in boxes_of_flat_range(placement.box.shape, share_start, share_stop):
            for kind, values in states.items():
                piece = values.detach()[offset : offset + box.numel]
                yield StatePiece(f"{kind}/{name}", placement.global_shape, shift_box(box, origin), piece, is_owner)
            offset += box.numel


def shift_box(box: Box, origin: tuple[int, ...]) -> Box:
    """The box as seen from outside, for one told relative to `origin`."""
    starts, stops = (tuple(map(add, edges, origin)) for edges in (box.starts, box.stops))
    return Box(starts, stops)
