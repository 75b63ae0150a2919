"""Chooses and assembles the engine that a config asks for, and quiets DeepSpeed."""

import io
import logging
from collections.abc import Mapping
from contextlib import redirect_stdout

import deepspeed
import deepspeed.ops
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger as deepspeed_logger

from megascale.config.training import PrecisionConfig
from megascale.engine.base import Engine, EngineSettings, Objective
from megascale.engine.ds_config import deepspeed_config
from megascale.engine.flat_zero import FlatZeroOptimizer
from megascale.engine.micro_batches import MicroBatchRunner, Runner
from megascale.engine.pipeline import build_pipeline
from megascale.engine.precision import TORCH_DTYPE, build_loss_scaler
from megascale.engine.replicas import divide_groups, norm_group
from megascale.engine.zero01 import WholeGradientEngine
from megascale.engine.zero23 import PartitionedGradientEngine, mark_counted, model_parallel_unit
from megascale.errors import LaunchError
from megascale.parallel.mesh import Mesh
from megascale.parallel.placement import Placement


def build_engine(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    mesh: Mesh,
    precision: PrecisionConfig,
    settings: EngineSettings,
    placements: Mapping[torch.nn.Parameter, Placement],
) -> Engine:
    """Puts this rank's part of the model on its device in the run's format and hands it, with its optimizer, to ZeRO.

    Args:
        model: what this rank holds, in fp32, equal on all ranks of the zero group. Called with what `objective` gives,
            it returns the loss; in a pipeline it has `stages`, which are called instead.
        optimizer: over `model`'s parameters; the engine takes it over.
        placements: where each parameter lies in the whole model, in the model's order.

    Raises:
        LaunchError: the layout and the ZeRO stage, or the optimizer's offload, don't go together.
    """
    check_settings(settings, mesh)
    connect_deepspeed(mesh)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(mesh.device)
    for parameter in placements:
        # ZeRO-3 shares parameters out one by one on their way to the device, which may not have room for all of them.
        device = mesh.device if settings.zero_stage < 3 else "cpu"
        parameter.data = parameter.data.to(device, TORCH_DTYPE[precision.dtype])
    with redirect_stdout(io.StringIO()):  # DeepSpeed prints memory figures while it builds
        if settings.zero_stage >= 2:
            return _build_partitioned(model, optimizer, objective, mesh, precision, settings, placements)
        flat_optimizer = FlatZeroOptimizer(
            optimizer,
            placements,
            replicas=divide_groups(optimizer, placements, mesh, settings.zero_stage),
            norm_group=norm_group(mesh, settings.zero_stage),
            clip_norm=settings.clip_norm,
            is_offloaded=settings.offload_optimizer == "cpu",
            tp=mesh.tp,
        )
    scaler = build_loss_scaler(precision.dtype, precision.initial_loss_scale_log2, precision.loss_scale_window_steps)
    runner = build_runner(model, objective, mesh, precision, settings, flat_optimizer)
    return WholeGradientEngine(flat_optimizer, placements, runner, scaler, mesh)


def build_runner(
    model: torch.nn.Module, objective: Objective, mesh: Mesh, precision: PrecisionConfig, settings: EngineSettings,
    optimizer: FlatZeroOptimizer,
) -> Runner:
    """What runs forward and backward: the model by itself, or its stages in a pipeline."""
    pipeline = settings.pipeline
    if pipeline is None:
        return MicroBatchRunner(model, objective, mesh.device)
    return build_pipeline(
        model.stages, pipeline.stage_indices, pipeline.num_stages, pipeline.schedule, pipeline.hidden_shape,
        TORCH_DTYPE[precision.dtype], mesh.device, mesh.pp, objective, optimizer.add_gradient,
    )


def _build_partitioned(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, objective: Objective, mesh: Mesh,
    precision: PrecisionConfig, settings: EngineSettings, placements: Mapping[torch.nn.Parameter, Placement],
) -> Engine:
    config = deepspeed_config(
        zero_stage=settings.zero_stage,
        dtype=precision.dtype,
        clip_norm=settings.clip_norm,
        micro_batch_size=settings.micro_batch_size,
        initial_loss_scale_log2=precision.initial_loss_scale_log2,
        loss_scale_window_steps=precision.loss_scale_window_steps,
        num_elements=sum(parameter.numel() for parameter in placements),
        is_offloaded=settings.offload_optimizer == "cpu",
        pins_memory=mesh.device.type == "cuda",
    )
    mark_counted(placements)
    unit = model_parallel_unit(mesh)
    if settings.zero_stage == 3:
        deepspeed.zero.Init(module=model, config_dict_or_path=config, data_parallel_group=mesh.zero_group, mpu=unit)
    ds_engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=unit)
    return PartitionedGradientEngine(ds_engine, settings.zero_stage, placements, objective, mesh)


def check_settings(settings: EngineSettings, mesh: Mesh) -> None:
    """Refuses what can't be made right, for callers that didn't come through `megascale check`.

    Raises:
        LaunchError: with the reason and what would work.
    """
    stage = settings.zero_stage
    if stage >= 2 and mesh.pp.size > 1:
        raise LaunchError(
            f"zero_stage {stage} with pp {mesh.pp.size}: ZeRO-{stage} reduces gradients in every micro-batch, of which"
            " a pipeline has many in flight, each through another part of the model; use zero_stage 0 or 1, or pp 1"
        )
    if stage >= 2 and mesh.ep.size > 1:
        raise LaunchError(
            f"zero_stage {stage} with ep {mesh.ep.size}: DeepSpeed's ZeRO-{stage} shares all parameters out over one"
            " group of ranks, and experts have fewer replicas than the rest; use zero_stage 0 or 1, or ep 1"
        )
    if (mesh.pp.size > 1) != (settings.pipeline is not None):
        raise LaunchError(
            f"pp {mesh.pp.size} with{'' if settings.pipeline else 'out'} pipeline settings: they go with pp > 1 only"
        )


def connect_deepspeed(mesh: Mesh) -> None:
    """Lets DeepSpeed use the process groups that exist.

    On CPU it would first compile a shared-memory op at every start; a process killed while compiling leaves a lock on
    which every later start waits for ever. Gloo does without the op. DeepSpeed also refuses fp16 on a CPU without fp16
    instructions, where it is slow but right.
    """
    deepspeed_logger.setLevel(logging.ERROR)
    if mesh.device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed("nccl" if mesh.device.type == "cuda" else "gloo", auto_mpi_discovery=False,
                               verbose=False)
