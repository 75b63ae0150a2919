"""Where DeepSpeed's ZeRO optimizers keep each parameter's fp32 state, told in global coordinates.

DeepSpeed flattens each parameter group and gives every rank one range of it. Its `_hp_mapping` on a parameter links the
part that lives here to views of the master weight and the moments.
"""

from collections.abc import Iterable, Iterator

import torch

from megascale.engine.base import StatePiece
from megascale.parallel.boxes import boxes_of_flat_range

MOMENTS = ("exp_avg", "exp_avg_sq")


def init_adam_state(optimizer: torch.optim.Optimizer, partitions: Iterable[torch.Tensor]) -> None:
    """Makes AdamW's state now rather than at the first step, so that a checkpoint can be loaded into it."""
    for partition in partitions:
        fused = any(group.get("fused") for group in optimizer.param_groups)
        optimizer.state[partition] = {
            "step": torch.zeros((), device=partition.device if fused else "cpu"),
            **{name: torch.zeros_like(partition, requires_grad=False) for name in MOMENTS},
        }


def linked_pieces(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], owner_rank: int, num_owners: int
) -> Iterator[StatePiece]:
    """Pieces of parameters whose optimizer keeps them linked (ZeRO 0, 1, 2).

    Args:
        owner_rank, num_owners: which share of each range this rank writes, where several ranks hold the same one; 0 of
            1 where the ranges are disjoint.
    """
    for name, parameter in named_parameters:
        fragment = parameter._hp_mapping
        if fragment is None:
            continue
        states = {"master": fragment.hp_fragment, **{key: fragment.optim_fragment[key] for key in MOMENTS}}
        start, numel = fragment.lp_fragment_address.start, fragment.lp_fragment_address.numel
        yield from flat_pieces(name, parameter.shape, start, numel, states, owner_rank, num_owners)


def flat_pieces(
    name: str,
    shape: tuple[int, ...],
    start: int,
    numel: int,
    states: dict[str, torch.Tensor],
    owner_rank: int = 0,
    num_owners: int = 1,
) -> Iterator[StatePiece]:
    """Pieces of the flat range [start, start + numel) of one parameter, one per box and kind of state."""
    for share in range(num_owners):
        share_start, share_stop = (start + numel * edge // num_owners for edge in (share, share + 1))
        offset = share_start - start
        for box in boxes_of_flat_range(tuple(shape), share_start, share_stop):
            for kind, values in states.items():
                piece = values.detach()[offset : offset + box.numel]
                yield StatePiece(f"{kind}/{name}", tuple(shape), box, piece, is_owner=share == owner_rank)
            offset += box.numel
