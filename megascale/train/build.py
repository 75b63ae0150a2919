"""From a config and a mesh to the engine of a run: axes, stages, model, optimizer, engine."""

from collections.abc import Iterable, Mapping
from functools import partial

import torch

from megascale.config.derive import Derived
from megascale.config.schema import RunConfig
from megascale.config.target import target_len
from megascale.config.vit_rules import extra_positions
from megascale.engine.base import Engine, EngineSettings, PipelineSettings
from megascale.engine.build import build_engine
from megascale.engine.watched import WatchedEngine
from megascale.model.axes import Axes
from megascale.model.flops import layer_costs
from megascale.model.fp8 import check_fp8
from megascale.model.head import Head
from megascale.model.linear import use_fp8
from megascale.model.matrices import is_hidden_matrix, is_matrix, split_fused
from megascale.model.mup import decay_factor, lr_factor
from megascale.model.recompute import set_recompute
from megascale.model.sharding import is_decayed
from megascale.model.transformer import Transformer, build_model, compile_blocks, parameter_shapes
from megascale.optim.groups import ParameterFacts, parameter_groups
from megascale.optim.optimizer import build_optimizer
from megascale.parallel.layout import Layout
from megascale.parallel.mesh import Mesh
from megascale.parallel.stages import plan_stages, stages_of_rank
from megascale.train.objective import run_objective
from megascale.train.routing import RouterWatcher


def build_run_engine(config: RunConfig, mesh: Mesh) -> Engine:
    """Builds this rank's part of the model and hands it, with its optimizer, to the engine. Every rank calls it."""
    axes = build_axes(config, mesh)
    model = build_rank_model(config, axes, mesh)
    objective = run_objective(config, axes)
    placements = model.placements()
    named = [(placement.name, parameter) for parameter, placement in placements.items()]
    optimizer = build_run_optimizer(config, named, parameter_shapes(config.model))
    settings = EngineSettings(
        zero_stage=config.parallel.zero_stage,
        clip_norm=config.optimizer.clip_norm,
        micro_batch_size=config.train.micro_batch_size,
        offload_optimizer=config.parallel.offload_optimizer,
        pipeline=pipeline_settings(config, axes, mesh) if mesh.pp.size > 1 else None,
    )
    engine = build_engine(model, optimizer, objective, mesh, config.precision, settings, placements)
    if config.model.moe is None:
        return engine
    return WatchedEngine(engine, [RouterWatcher(model, config.model, axes, mesh)])


def build_run_optimizer(
    config: RunConfig, named: Iterable[tuple[str, torch.nn.Parameter]], shapes: Mapping[str, tuple[int, ...]]
) -> torch.optim.Optimizer:
    """The optimizer of a config over parameters of this rank.

    Args:
        shapes: of the whole model's parameters.

    Raises:
        ConfigError: a pattern of `optimizer.groups` fits no parameter.
    """
    return build_optimizer(
        parameter_groups(named, parameter_facts(config, shapes), config.optimizer),
        config.optimizer,
        split_parts=partial(split_fused, model=config.model),
        is_fp32=config.precision.dtype == "fp32",
    )


def parameter_facts(config: RunConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, ParameterFacts]:
    """What the optimizer has to know of each parameter of the whole model."""
    is_treated = is_hidden_matrix if config.optimizer.kind == "muon" else is_matrix
    return {
        name: ParameterFacts(
            is_decayed(name), is_treated(name, shape), lr_factor(name, shape, config.model),
            decay_factor(name, shape, config.model),
        )
        for name, shape in shapes.items()
    }


def pipeline_settings(config: RunConfig, axes: Axes, mesh: Mesh) -> PipelineSettings:
    """This rank's part in the pipeline."""
    train, parallel = config.train, config.parallel
    shards = axes.cp.size * (axes.tp.size if axes.is_sequence_parallel else 1)
    num_positions = train.seq_len + target_len(config) + extra_positions(config.model)
    return PipelineSettings(
        stage_indices=tuple(own_stages(config, mesh)),
        num_stages=parallel.pp * parallel.stages_per_rank,
        schedule=parallel.schedule,
        hidden_shape=(train.micro_batch_size, num_positions // shards, config.model.d_model),
    )


def layout_of(config: RunConfig, derived: Derived) -> Layout:
    """The sizes of the parallel axes of a run."""
    parallel = config.parallel
    return Layout(pp=parallel.pp, dp=derived.dp, cp=parallel.cp, tp=parallel.tp, ep=parallel.ep)


def build_axes(config: RunConfig, mesh: Mesh) -> Axes:
    """The mesh as layers see it."""
    return Axes(
        tp=mesh.tp,
        kv=mesh.split_tp(max(1, mesh.tp.size // config.model.kv_heads)),
        cp=mesh.cp,
        ep=mesh.ep,
        pp=mesh.pp,
        ends=mesh.ends,
        is_sequence_parallel=config.parallel.is_sequence_parallel,
        context_attention=config.parallel.context_attention,
    )


def own_stages(config: RunConfig, mesh: Mesh) -> dict[int, range]:
    """This rank's pipeline stages: number of the stage -> its layers."""
    parallel = config.parallel
    costs = layer_costs(config.model, config.train.seq_len, target_len(config))
    stages = plan_stages(costs, parallel.pp * parallel.stages_per_rank, parallel.stage_layers)
    own = stages_of_rank(parallel.schedule, parallel.pp, parallel.stages_per_rank, mesh.pp.rank)
    return {index: stages[index] for index in own}


def build_rank_model(config: RunConfig, axes: Axes, mesh: Mesh) -> Transformer:
    """The stages of this rank, with what the config says of memory, compilation and fp8."""
    train = config.train
    model = build_model(config.model, config.run.seed, axes, list(own_stages(config, mesh).values()))
    set_recompute(
        model, train.recompute,
        parts=train.recompute_parts, every=train.recompute_every, offload=train.offload_activations,
    )
    for layer in model.layers:
        if isinstance(layer, Head):
            layer.label_smoothing = config.data.objective.label_smoothing
    if config.precision.fp8_linear:
        check_fp8(mesh.device)
        use_fp8(model)
    if train.compile:
        compile_blocks(model)
    return model
