"""From a config to everything that the loop needs, straight down: ranks, data, model, engine, state, logs."""

import secrets
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from megascale.checkpoint.comm import run_on_rank_zero
from megascale.checkpoint.find import VerifiedCheckpoint
from megascale.checkpoint.fork import check_not_itself, describe_turn, open_fork, parse_fork
from megascale.checkpoint.index import RunRecord, code_versions
from megascale.checkpoint.lease import RunLease
from megascale.checkpoint.load import load_pieces
from megascale.checkpoint.retention import Retention
from megascale.checkpoint.run_file import open_run_store
from megascale.checkpoint.save import Saver, build_writer
from megascale.checkpoint.state import RunState
from megascale.checkpoint.store import Store
from megascale.config.derive import Derived, derive, describe
from megascale.config.dump import config_fingerprint, resolved_values
from megascale.config.schema import RunConfig
from megascale.config.target import target_len
from megascale.data.loader import Loader
from megascale.data.manifest import read_tokenizer
from megascale.data.plan import describe_plan
from megascale.data.rows import Corpus
from megascale.data.stream import Stream, open_stream, open_validation, plan_stream
from megascale.data.transfer import access_of
from megascale.engine.base import Engine
from megascale.model.flops import num_active_parameters, num_parameters, train_flops_per_token
from megascale.observe.build import build_logger
from megascale.observe.console import say
from megascale.observe.logger import Logger
from megascale.observe.peaks import peak_bf16_flops
from megascale.observe.run_files import Session, append_session
from megascale.observe.throughput import StepTimer
from megascale.parallel.heartbeat import Heartbeat, Phase
from megascale.parallel.mesh import Mesh, RankInfo, build_mesh
from megascale.train.build import build_run_engine, layout_of
from megascale.train.origin import Origin, find_origin
from megascale.train.probe import Probe, check_probe, read_probe
from megascale.train.run_folder import claim_run_folder, describe_run_folder, file_of_tokenizer, read_git_commit
from megascale.train.signals import StopRequest
from megascale.train.start_options import StartOptions


@dataclass(frozen=True)
class Run:
    """A run that is ready to train: what stays the same from its first step to its last.

    Attributes:
        start: the state that this session begins with.
        record: what every checkpoint says about the run.
        validation: the corpora that have a validation split.
        saver: saves checkpoints.
        stop: what was asked of the run from outside.
        pulse: tells who watches what this rank is doing.
        probe: what is evaluated for each checkpoint; None when none is wanted.
    """

    config: RunConfig
    derived: Derived
    folder: Path
    mesh: Mesh
    loader: Loader
    validation: tuple[Corpus, ...]
    engine: Engine
    start: RunState
    saver: Saver
    record: RunRecord
    logger: Logger
    timer: StepTimer
    stop: StopRequest
    pulse: Heartbeat
    probe: Probe | None

    @property
    def corpus_names(self) -> list[str]:
        """Of the training corpora, in the order of the stream."""
        return [corpus.name for corpus in self.loader.stream.corpora]


def set_up(
    config: RunConfig, source: str, info: RankInfo, stop: StopRequest, pulse: Heartbeat, at_end: ExitStack,
    options: StartOptions,
) -> Run:
    """Builds a run on this rank, resumed from its newest whole checkpoint when there is one, else begun from that of
    the run that it forks. Every rank calls it.

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
    fork = parse_fork(options.fork) if options.fork else None
    if fork is not None:
        check_not_itself(fork, folder)

    pulse.enter(Phase.JOIN)
    mesh = build_mesh(layout_of(config, derived), info)
    pulse.enter(Phase.LOAD)
    loader = Loader(
        stream, derived.batches, config.train.micro_batch_size, mesh.dp_rank, derived.dp,
        is_pinned=mesh.device.type == "cuda",
    )
    at_end.callback(close_stores, [*stream.corpora, *validation])
    record = describe_run(config, stream, validation, read_git_commit() if mesh.rank == 0 else None)
    if fork is not None and options.is_fresh:
        open_fork(fork, record.run_id, mesh)  # before a run is set aside for one that can't begin
    record, lease = claim_run_folder(
        folder, mesh, record, manifest.eos_id, config.checkpoint.url, options.is_fresh
    )
    if lease is not None:
        at_end.callback(lease.release)
    store = open_run_store(folder, config.checkpoint.url, record.run_id)
    origin = find_origin(store, record, derived.batches, mesh, fork, options.allowed)
    record, checkpoint = replace(record, lineage=origin.lineage), origin.checkpoint
    access = access_of(config.data)
    run_on_rank_zero(mesh, lambda: describe_run_folder(
        folder, record, read_tokenizer(manifest, access), file_of_tokenizer(manifest)))

    engine = build_run_engine(config, mesh)
    start = _load_state(origin, engine, mesh)
    probe = _prepare_probe(config, record, checkpoint, stream, validation, engine, mesh)
    saver = _build_saver(config, store, record, mesh, lease, origin.saved_step)
    at_end.callback(saver.close)
    if saver.saved_step is not None:
        pulse.note_saved(saver.saved_step)
    stop.look_in(folder)
    logger, timer = _build_observers(config, derived, plan, folder, mesh, start, origin, record.code, pulse)
    return Run(
        config, derived, folder, mesh, loader, validation, engine, start, saver, record, logger, timer, stop, pulse,
        probe,
    )


def close_stores(corpora: Sequence[Corpus]) -> None:
    """Ends what fetches shards."""
    for corpus in corpora:
        corpus.store.close()


def describe_run(
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
        lineage=(),
    )


def _load_state(origin: Origin, engine: Engine, mesh: Mesh) -> RunState:
    if origin.checkpoint is None:
        return RunState.at_start(wandb_run_id=secrets.token_hex(8))
    load_pieces(origin.checkpoint, engine.state_pieces(), comm=mesh)
    state = origin.checkpoint.index.state
    engine.restore_scalars(state.optimizer_scalars)
    return replace(state, wandb_run_id=secrets.token_hex(8)) if origin.is_fork else state


def _prepare_probe(
    config: RunConfig, record: RunRecord, checkpoint: VerifiedCheckpoint | None, stream: Stream,
    validation: Sequence[Corpus], engine: Engine, mesh: Mesh,
) -> Probe | None:
    """The batch of later checkpoints; the one of the checkpoint that was loaded must have its loss still."""
    if not config.checkpoint.probe:
        return None
    micro_rows, dtype = config.train.micro_batch_size, config.precision.dtype
    if checkpoint is not None:
        found = check_probe(checkpoint, record.config, stream.objective, micro_rows, engine, mesh, dtype)
        if found and mesh.rank == 0:
            say(found)
    return read_probe(validation[0], stream.objective, micro_rows)


def _build_saver(
    config: RunConfig, store: Store, record: RunRecord, mesh: Mesh, lease: RunLease | None, saved_step: int | None
) -> Saver:
    policy = config.checkpoint
    return Saver(
        store, record, comm=mesh,
        retention=Retention(policy.keep_last, policy.keep_every_steps, policy.keep_best),
        writer=build_writer(policy.asynchronous, mesh.device),
        claim=lease.claim if lease else None, read_back=policy.read_back, saved_step=saved_step,
    )


def _build_observers(
    config: RunConfig, derived: Derived, plan: list[tuple[str, str]], folder: Path, mesh: Mesh, start: RunState,
    origin: Origin, code: dict[str, str], pulse: Heartbeat,
) -> tuple[Logger, StepTimer]:
    """The logs, on rank 0 only, and the timer."""
    device_name = torch.cuda.get_device_name() if mesh.device.type == "cuda" else "cpu"
    peak = config.observe.peak_flops_per_device or peak_bf16_flops(device_name)
    timer = StepTimer(
        train_flops_per_token(config.model, config.train.seq_len, target_len(config)),
        peak * derived.world_size if peak else None
    )
    if mesh.rank:
        return Logger(), timer
    facts = dict(describe(config, derived)) | {"parameters": f"{num_parameters(config.model):,}"}
    if config.model.moe is not None:
        facts["parameters of a token"] = f"{num_active_parameters(config.model):,}"
    for name, value in [*facts.items(), *plan]:
        say(f"{name:>18}  {value}")
    if (checkpoint := origin.checkpoint) is not None:
        for reason in checkpoint.rejected:
            say(f"warning: passed over a damaged checkpoint: {reason}")
        say(f"{'a new run, forked' if origin.is_fork else 'resuming'} from {checkpoint.path} at step {start.step}")
    append_session(folder, Session(
        unix_s=time.time(),
        resumed_step=start.step,
        world_size=derived.world_size,
        layout=asdict(mesh.layout) | {"zero_stage": config.parallel.zero_stage},
        versions={package: version for package, version in code.items() if package != "git_commit"},
        git_commit=code.get("git_commit"),
        news=describe_turn(origin.news) if origin.news else "",
        facts=facts | {"reading": "; ".join(f"{name.strip()} {text}" for name, text in plan)},
    ))
    logger = build_logger(
        config.observe, mesh.rank, folder, start.wandb_run_id, start.step, config.train.max_steps,
        resolved_values(config), pulse=pulse,
    )
    return logger, timer
