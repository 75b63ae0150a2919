"""From a config and a mesh to the engine of a run: axes, stages, model, optimizer, engine."""

from megascale.config.derive import Derived
from megascale.config.schema import RunConfig
from megascale.engine.base import Engine, EngineSettings, PipelineSettings
from megascale.engine.build import build_engine
from megascale.model.axes import Axes
from megascale.model.flops import layer_costs
from megascale.model.fp8 import check_fp8
from megascale.model.linear import use_fp8
from megascale.model.recompute import set_recompute
from megascale.model.sharding import is_decayed
from megascale.model.transformer import Transformer, build_model, compile_blocks
from megascale.optim.optimizer import build_adamw, parameter_groups
from megascale.parallel.layout import Layout
from megascale.parallel.mesh import Mesh
from megascale.parallel.stages import plan_stages, stages_of_rank
from megascale.train.objective import run_objective


def build_run_engine(config: RunConfig, mesh: Mesh) -> Engine:
    """Builds this rank's part of the model and hands it, with its optimizer, to the engine. Every rank calls it."""
    axes = build_axes(config, mesh)
    model = build_rank_model(config, axes, mesh)
    objective = run_objective(config, axes)
    placements = model.placements()
    named = [(placement.name, parameter) for parameter, placement in placements.items()]
    groups = parameter_groups(named, config.optimizer.weight_decay, is_decayed)
    optimizer = build_adamw(
        groups,
        learning_rate=config.optimizer.learning_rate,
        beta1=config.optimizer.beta1,
        beta2=config.optimizer.beta2,
        eps=config.optimizer.eps,
    )
    settings = EngineSettings(
        zero_stage=config.parallel.zero_stage,
        clip_norm=config.optimizer.clip_norm,
        micro_batch_size=config.train.micro_batch_size,
        offload_optimizer=config.parallel.offload_optimizer,
        pipeline=pipeline_settings(config, axes, mesh) if mesh.pp.size > 1 else None,
    )
    return build_engine(model, optimizer, objective, mesh, config.precision, settings, placements)


def pipeline_settings(config: RunConfig, axes: Axes, mesh: Mesh) -> PipelineSettings:
    """This rank's part in the pipeline."""
    train, parallel = config.train, config.parallel
    shards = axes.cp.size * (axes.tp.size if axes.is_sequence_parallel else 1)
    return PipelineSettings(
        stage_indices=tuple(own_stages(config, mesh)),
        num_stages=parallel.pp * parallel.stages_per_rank,
        schedule=parallel.schedule,
        hidden_shape=(train.micro_batch_size, train.seq_len // shards, config.model.d_model),
    )


def layout_of(config: RunConfig, derived: Derived) -> Layout:
    """The sizes of the parallel axes of a run."""
    parallel = config.parallel
    return Layout(pp=parallel.pp, dp=derived.dp, cp=parallel.cp, tp=parallel.tp)


def build_axes(config: RunConfig, mesh: Mesh) -> Axes:
    """The mesh as layers see it."""
    return Axes(
        tp=mesh.tp,
        kv=mesh.split_tp(max(1, mesh.tp.size // config.model.kv_heads)),
        cp=mesh.cp,
        ends=mesh.ends,
        is_sequence_parallel=config.parallel.is_sequence_parallel,
        context_attention=config.parallel.context_attention,
    )


def own_stages(config: RunConfig, mesh: Mesh) -> dict[int, range]:
    """This rank's pipeline stages: number of the stage -> its layers."""
    parallel = config.parallel
    costs = layer_costs(config.model, config.train.seq_len)
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
    if config.precision.fp8_linear:
        check_fp8(mesh.device)
        use_fp8(model)
    if train.compile:
        compile_blocks(model)
    return model
