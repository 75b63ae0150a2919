"""From a config to everything that the loop needs, straight down: ranks, data, model, engine, state, logs."""

import secrets
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from megascale.checkpoint.comm import run_on_rank_zero
from megascale.checkpoint.compare import check_same_run
from megascale.checkpoint.find import VerifiedCheckpoint, find_checkpoint
from megascale.checkpoint.index import RunRecord, code_versions
from megascale.checkpoint.lease import RunLease
from megascale.checkpoint.load import load_pieces
from megascale.checkpoint.state import RunState
from megascale.config.derive import Derived, derive, describe
from megascale.config.dump import config_fingerprint, keeps_maths, resolved_values
from megascale.config.schema import RunConfig
from megascale.data.loader import Loader
from megascale.data.order import RowOrder
from megascale.data.rows import CorpusRows, open_rows
from megascale.engine.base import Engine
from megascale.model.flops import num_parameters, train_flops_per_token
from megascale.observe.build import build_logger
from megascale.observe.console import say
from megascale.observe.logger import Logger
from megascale.observe.peaks import peak_bf16_flops
from megascale.observe.run_files import Session, append_session
from megascale.observe.throughput import StepTimer
from megascale.parallel.layout import AXES
from megascale.parallel.mesh import Mesh, RankInfo, build_mesh
from megascale.train.build import build_run_engine, layout_of
from megascale.train.run_folder import claim_run_folder, describe_run_folder, read_git_commit
from megascale.train.signals import StopRequest


@dataclass(frozen=True)
class Run:
    """A run that is ready to train: what stays the same from its first step to its last.

    Attributes:
        start: the state that this session begins with.
        saved_step: step of the checkpoint that it came from, None for a fresh start.
        record: what every checkpoint says about the run.
    """

    config: RunConfig
    derived: Derived
    folder: Path
    mesh: Mesh
    loader: Loader
    validation: CorpusRows
    engine: Engine
    start: RunState
    saved_step: int | None
    record: RunRecord
    lease: RunLease | None
    logger: Logger
    timer: StepTimer
    stop: StopRequest


def set_up(
    config: RunConfig, source: str, info: RankInfo, stop: StopRequest, at_end: ExitStack, *, is_fresh: bool
) -> Run:
    """Builds a run on this rank, resumed from its newest whole checkpoint when there is one. Every rank calls it.

    Args:
        source: file that the config came from, for messages.
        at_end: is given what must be released in whatever way the run ends, a failure in here included.

    Raises:
        ConfigError, DataError, CheckpointError, LaunchError: before anything was written but the claim on the folder.
    """
    derived = derive(config, info.world_size, source)
    train_rows = _open_split(config, "train")
    validation_rows = _open_split(config, "validation")
    folder = Path(config.run.folder)

    mesh = build_mesh(layout_of(config, derived), info)
    order = RowOrder(train_rows.rows_per_shard, config.run.seed, config.data.num_lanes, config.data.window_rows)
    loader = Loader(
        train_rows, order, derived.rows_per_step, config.train.micro_batch_size, mesh.dp_rank, derived.dp
    )
    record = _describe_run(config, train_rows, validation_rows, read_git_commit() if mesh.rank == 0 else None)
    record, lease = claim_run_folder(folder, mesh, record, train_rows.manifest.eos_id, is_fresh)
    if lease:
        at_end.callback(lease.release)
    checkpoint = find_checkpoint(folder, run_id=record.run_id, comm=mesh)
    if checkpoint is not None:
        changes = check_same_run(checkpoint.index.run, record, keeps_maths)
        for change in changes if mesh.rank == 0 else ():
            say(f"changed since the checkpoint, without effect on what is computed: {change}")
    run_on_rank_zero(mesh, lambda: describe_run_folder(folder, record, train_rows.manifest.tokenizer_path))

    engine = build_run_engine(config, derived, mesh, train_rows.manifest.eos_id)
    start = _load_state(checkpoint, engine, mesh)
    logger, timer = _build_observers(config, derived, folder, mesh, start, checkpoint, record.code)
    return Run(
        config, derived, folder, mesh, loader, validation_rows, engine, start,
        start.step if checkpoint else None, record, lease, logger, timer, stop,
    )


def _open_split(config: RunConfig, split: str) -> CorpusRows:
    return open_rows(config.data.folder, split, config.train.seq_len, config.model.vocab_size)


def _describe_run(
    config: RunConfig, train_rows: CorpusRows, validation_rows: CorpusRows, git_commit: str | None
) -> RunRecord:
    """What the run is; `claim_run_folder` fills in which."""
    values = resolved_values(config)
    return RunRecord(
        run_id="unclaimed",
        config=values,
        config_fingerprint=config_fingerprint(values),
        data_fingerprints={rows.manifest.split: rows.manifest.fingerprint for rows in (train_rows, validation_rows)},
        code=code_versions(git_commit),
    )


def _load_state(checkpoint: VerifiedCheckpoint | None, engine: Engine, mesh: Mesh) -> RunState:
    if checkpoint is None:
        return RunState.at_start(wandb_run_id=secrets.token_hex(8))
    load_pieces(checkpoint, engine.state_pieces(), comm=mesh)
    state = checkpoint.index.state
    engine.restore_scalars(state.optimizer_scalars)
    return state


def _build_observers(
    config: RunConfig, derived: Derived, folder: Path, mesh: Mesh, start: RunState,
    checkpoint: VerifiedCheckpoint | None, code: dict[str, str],
) -> tuple[Logger, StepTimer]:
    """The logs, on rank 0 only, and the timer."""
    device_name = torch.cuda.get_device_name() if mesh.device.type == "cuda" else "cpu"
    peak = config.observe.peak_flops_per_device or peak_bf16_flops(device_name)
    timer = StepTimer(
        train_flops_per_token(config.model, config.train.seq_len), peak * derived.world_size if peak else None
    )
    if mesh.rank:
        return Logger(), timer
    facts = dict(describe(config, derived)) | {"parameters": f"{num_parameters(config.model):,}"}
    for name, value in facts.items():
        say(f"{name:>18}  {value}")
    if checkpoint is not None:
        for reason in checkpoint.rejected:
            say(f"warning: passed over a damaged checkpoint: {reason}")
        say(f"resuming from {checkpoint.path} at step {start.step}")
    append_session(folder, Session(
        unix_s=time.time(),
        resumed_step=start.step,
        world_size=derived.world_size,
        layout={axis: getattr(mesh.layout, axis) for axis in AXES} | {"zero_stage": config.parallel.zero_stage},
        versions={package: version for package, version in code.items() if package != "git_commit"},
        git_commit=code.get("git_commit"),
        facts=facts,
    ))
    logger = build_logger(
        config.observe, mesh.rank, folder, start.wandb_run_id, start.step, config.train.max_steps,
        resolved_values(config),
    )
    return logger, timer
