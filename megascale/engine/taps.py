"""Where a diagnosis looks into an engine: its stages, what they are called with, gradients before they are used.

Nothing here is part of a training run; `megascale parity` hangs it onto an engine from outside.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_local_grad

from megascale.engine.base import Engine, Objective, StatePiece
from megascale.engine.fragments import flat_pieces
from megascale.engine.pipeline import PipelineRunner
from megascale.engine.zero01 import WholeGradientEngine
from megascale.engine.zero23 import PartitionedGradientEngine


def stages_of(engine: Engine) -> list[torch.nn.Module]:
    """The stages that this rank runs, in the order of the model's `stages`."""
    runner = engine.runner
    if isinstance(runner, PipelineRunner):
        return [fed.stage for fed in runner.stages.values()]
    return list(getattr(runner.module, "module", runner.module).stages)


def change_objective(engine: Engine, change: Callable[[Objective], Objective]) -> None:
    """Puts another objective in the place of the engine's own."""
    runner = engine.runner
    if isinstance(runner, PipelineRunner):
        runner.feed.objective = change(runner.feed.objective)
    else:
        engine.runner = replace(runner, objective=change(runner.objective))


def call_before_update(engine: Engine, note: Callable[[Iterator[StatePiece]], None]) -> None:
    """Has `note` called in each step with `gradient_pieces`, when gradients are reduced and not yet clipped."""
    optimizer = engine.optimizer if isinstance(engine, WholeGradientEngine) else engine.zero
    step = optimizer.step

    def note_and_step(*arguments, **options):
        note(gradient_pieces(engine))
        return step(*arguments, **options)

    optimizer.step = note_and_step


def gradient_pieces(engine: Engine) -> Iterator[StatePiece]:
    """The fp32 gradients on this rank, unscaled, under keys such as `gradient/head.weight`.

    To be read when `call_before_update` calls. As with an engine's own pieces, those that ranks own tile each tensor.
    """
    if isinstance(engine, WholeGradientEngine):
        yield from _whole_gradients(engine)
    elif engine.zero_stage == 2:
        yield from _stage2_gradients(engine)
    else:
        yield from _stage3_gradients(engine)


def _whole_gradients(engine: WholeGradientEngine) -> Iterator[StatePiece]:
    optimizer = engine.optimizer
    for parameter, placement in engine.placements.items():
        fragment = parameter._hp_mapping
        if fragment is not None:
            address, place = fragment.hp_fragment_address, fragment.lp_fragment_address
            gradient = optimizer.reduced[fragment.param_group_index].narrow(0, address.start, address.numel)
            share = optimizer.replicas[fragment.param_group_index].share
            yield from flat_pieces(placement, place.start, place.numel, {"gradient": gradient}, *share)


def _stage2_gradients(engine: PartitionedGradientEngine) -> Iterator[StatePiece]:
    for parameter, placement in engine.placements.items():
        fragment = parameter._hp_mapping
        if fragment is not None:
            gradient = fragment.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
            unscaled = gradient.float() / float(engine.zero.loss_scale)
            place = fragment.lp_fragment_address
            yield from flat_pieces(placement, place.start, place.numel, {"gradient": unscaled})


def _stage3_gradients(engine: PartitionedGradientEngine) -> Iterator[StatePiece]:
    """As with the masters, each parameter is cut into equal ranges, the last one padded."""
    rank = dist.get_rank(engine.mesh.zero_group)
    for parameter, placement in engine.placements.items():
        gradient = safe_get_local_grad(parameter).flatten()
        start = len(gradient) * rank
        numel = max(0, min(len(gradient), parameter.ds_numel - start))
        unscaled = gradient[:numel].float() / float(engine.zero.loss_scale)
        yield from flat_pieces(placement, start, numel, {"gradient": unscaled})
