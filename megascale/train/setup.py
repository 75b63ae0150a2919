"""From a config to everything that the loop needs, straight down: ranks, data, model, engine, state, logs."""

import secrets
import time
from collections.abc import Sequence
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
from megascale.data.manifest import read_tokenizer
from megascale.data.plan import describe_plan
from megascale.data.rows import Corpus
from megascale.data.stream import Stream, open_stream, open_validation, plan_stream
from megascale.data.transfer import access_of
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
        validation: the corpora that have a validation split.
    """

    config: RunConfig
    derived: Derived
    folder: Path
    mesh: Mesh
    loader: Loader
    validation: tuple[Corpus, ...]
    engine: Engine
    start: RunState
    saved_step: int | None
    record: RunRecord
    lease: RunLease | None
    logger: Logger
    timer: StepTimer
    stop: StopRequest

    @property
    def corpus_names(self) -> list[str]:
        """Of the training corpora, in the order of the stream."""
        return [corpus.name for corpus in self.loader.stream.corpora]


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
    stream, validation = open_stream(config, derived), open_validation(config)
    plan = describe_plan(plan_stream(config, derived, stream))
    folder, manifest = Path(config.run.folder), stream.corpora[0].manifest

    mesh = build_mesh(layout_of(config, derived), info)
    loader = Loader(
        stream, derived.batches, config.train.micro_batch_size, mesh.dp_rank, derived.dp,
        is_pinned=mesh.device.type == "cuda",
    )
    at_end.callback(close_stores, [*stream.corpora, *validation])
    record = _describe_run(config, stream, validation, read_git_commit() if mesh.rank == 0 else None)
    record, lease = claim_run_folder(folder, mesh, record, manifest.eos_id, is_fresh)
    if lease:
        at_end.callback(lease.release)
    checkpoint = find_checkpoint(folder, run_id=record.run_id, comm=mesh)
    if checkpoint is not None:
        changes = check_same_run(checkpoint.index, record, keeps_maths)
        for change in changes if mesh.rank == 0 else ():
            say(f"changed since the checkpoint, without effect on what is computed: {change}")
    access = access_of(config.data)
    run_on_rank_zero(mesh, lambda: describe_run_folder(folder, record, read_tokenizer(manifest, access)))

    engine = build_run_engine(config, mesh)
    start = _load_state(checkpoint, engine, mesh)
    logger, timer = _build_observers(config, derived, plan, folder, mesh, start, checkpoint, record.code)
    return Run(
        config, derived, folder, mesh, loader, validation, engine, start,
        start.step if checkpoint else None, record, lease, logger, timer, stop,
    )


def close_stores(corpora: Sequence[Corpus]) -> None:
    """Ends what fetches shards."""
    for corpus in corpora:
        corpus.store.close()


def _describe_run(
    config: RunConfig, stream: Stream, validation: Sequence[Corpus], git_commit: str | None
) -> RunRecord:
    """What the run is; `claim_run_folder` fills in which."""
    values = resolved_values(config)
    return RunRecord(
        run_id="unclaimed",
        config=values,
        config_fingerprint=config_fingerprint(values),
        stream=stream.describe(),
        validation={corpus.name: corpus.manifest.fingerprint for corpus in validation},
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
    config: RunConfig, derived: Derived, plan: list[tuple[str, str]], folder: Path, mesh: Mesh, start: RunState,
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
    for name, value in [*facts.items(), *plan]:
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
        facts=facts | {"reading": "; ".join(f"{name.strip()} {text}" for name, text in plan)},
    ))
    logger = build_logger(
        config.observe, mesh.rank, folder, start.wandb_run_id, start.step, config.train.max_steps,
        resolved_values(config),
    )
    return logger, timer
