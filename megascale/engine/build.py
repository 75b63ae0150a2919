"""Chooses and assembles the engine that a config asks for, and quiets DeepSpeed."""

import io
import logging
from contextlib import redirect_stdout

import deepspeed
import deepspeed.ops
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger as deepspeed_logger

from megascale.config.training import PrecisionConfig
from megascale.engine.base import Engine, Objective
from megascale.engine.ds_config import deepspeed_config
from megascale.engine.flat_zero import FlatZeroOptimizer
from megascale.engine.precision import TORCH_DTYPE, build_loss_scaler
from megascale.engine.zero01 import WholeGradientEngine
from megascale.engine.zero23 import PartitionedGradientEngine
from megascale.parallel.mesh import Mesh


def build_engine(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    mesh: Mesh,
    precision: PrecisionConfig,
    *,
    zero_stage: int,
    clip_norm: float,
    micro_batch_size: int,
) -> Engine:
    """Puts the model on this rank's device in the run's format and hands it, with its optimizer, to ZeRO.

    Args:
        model: the whole model, equal on every replica, in fp32.
        optimizer: AdamW over `model`'s parameters; the engine takes it over.
    """
    with redirect_stdout(io.StringIO()):  # DeepSpeed prints memory figures while it builds
        return _build(model, optimizer, objective, mesh, precision, zero_stage, clip_norm, micro_batch_size)


def _build(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, objective: Objective, mesh: Mesh,
    precision: PrecisionConfig, zero_stage: int, clip_norm: float, micro_batch_size: int,
) -> Engine:
    connect_deepspeed(mesh)
    names = {parameter: name for name, parameter in model.named_parameters()}
    shapes = {name: tuple(parameter.shape) for parameter, name in names.items()}
    for buffer in model.buffers():
        buffer.data = buffer.data.to(mesh.device)
    for parameter in names:
        parameter.data = parameter.data.to(mesh.device if zero_stage < 3 else "cpu", TORCH_DTYPE[precision.dtype])
    if zero_stage <= 1:
        flat_optimizer = FlatZeroOptimizer(
            optimizer, names, mesh.dp_group, mesh.dp_group if zero_stage == 1 else mesh.self_group, clip_norm
        )
        scaler = build_loss_scaler(
            precision.dtype, precision.initial_loss_scale_log2, precision.loss_scale_window_steps
        )
        return WholeGradientEngine(model, flat_optimizer, names, objective, scaler, mesh)
    config = deepspeed_config(
        zero_stage=zero_stage,
        dtype=precision.dtype,
        clip_norm=clip_norm,
        micro_batch_size=micro_batch_size,
        initial_loss_scale_log2=precision.initial_loss_scale_log2,
        loss_scale_window_steps=precision.loss_scale_window_steps,
    )
    if zero_stage == 3:
        # Shares the parameters out one by one on their way to the device, which may not have room for all of them.
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
    ds_engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return PartitionedGradientEngine(ds_engine, zero_stage, names, shapes, objective, mesh)


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
