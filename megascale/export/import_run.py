"""A run that begins with given weights: `python -m megascale.export.import_run REQUEST`; the request is JSON.

Everything is checked first. Then the run folder is made as training makes it, with a checkpoint of step 0: these
weights, zero moments, and the start of the data stream. Training resumes from it, in any layout, as from any other.
"""

import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np

from megascale.checkpoint.comm import LocalComm
from megascale.checkpoint.index import BYTES_PER_ELEMENT, RunRecord
from megascale.checkpoint.lease import LeaseClaim
from megascale.checkpoint.persist import (
    MIB,
    SPARE_BYTES_PER_RANK,
    AbandonTask,
    CommitTask,
    WriteTask,
    abandon,
    commit,
    write_part,
)
from megascale.checkpoint.pieces import PieceRecord, RankPieces, file_bytes
from megascale.checkpoint.retention import Retention
from megascale.checkpoint.run_file import RUN_FILE, SAVED_FILE, note_saved, open_run_store, read_run_file
from megascale.checkpoint.state import RunState
from megascale.checkpoint.store import Store
from megascale.config.derive import Derived, derive
from megascale.config.dump import to_yaml
from megascale.config.load import load_config
from megascale.config.model import ModelConfig
from megascale.config.schema import RunConfig
from megascale.config.training import PrecisionConfig
from megascale.data.manifest import read_tokenizer
from megascale.data.stream import open_stream, open_validation
from megascale.data.tokenizer import parse_tokenizer
from megascale.data.transfer import access_of
from megascale.engine.precision import build_loss_scaler, scaler_values
from megascale.errors import CheckpointError, ConfigError, DataError, LeaseLostError, MegascaleError, SaveError
from megascale.export.hf_import import differences
from megascale.export.weight_source import WeightSource, open_source
from megascale.model.transformer import parameter_shapes
from megascale.optim.groups import group_of
from megascale.optim.state import EMA, state_shapes
from megascale.parallel.boxes import Box
from megascale.train.build import parameter_facts
from megascale.train.request import serve_request
from megascale.train.run_folder import (
    TOKENIZER_FILE,
    claim_run_folder,
    describe_run_folder,
    file_of_tokenizer,
    read_git_commit,
)
from megascale.train.setup import close_stores, describe_run

States = Mapping[str, Mapping[str, tuple[int, ...]]]
"""Global parameter name -> kind of state -> its unsharded shape."""
PART_BYTES = 4 << 30
"""Size from which on a file of the checkpoint takes no further parameter, so that ranks can share the reading out."""


@dataclass(frozen=True)
class Target:
    """The run that is to begin.

    Attributes:
        record: without its run id.
        tokenizer: of its corpora, content of `tokenizer.json`.
        eos_id: ends a text in them.
        tokenizer_file: its name in the run folder.
    """

    config: RunConfig
    record: RunRecord
    tokenizer: bytes
    eos_id: int
    tokenizer_file: str

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.run.folder)


def serve(request: dict) -> None:
    """Imports what a request asks for, or prints the `model` section of its source."""
    if request["show"]:
        print(to_yaml({"model": open_source(request["source"]).section}), end="")
        return
    try:
        import_weights(
            Path(request["config"]), request["overrides"], request["source"], is_fresh=request["fresh"],
            allows_other_tokenizer=request["allow_other_tokenizer"],
        )
    except KeyboardInterrupt:
        raise MegascaleError("interrupted; nothing was imported") from None


def import_weights(
    config_path: Path, overrides: list[str], source_text: str, *, is_fresh: bool, allows_other_tokenizer: bool
) -> None:
    """Begins the run of a config with the weights of a source.

    Raises:
        ConfigError, DataError, CheckpointError: it doesn't fit, or the folder holds a run; nothing was written.
        SaveError: the checkpoint couldn't be written; the folder holds no run.

    Cost: reads the weights once and writes 12 bytes a parameter; in memory a few copies of the largest tensor.
    """
    config = load_config(config_path, overrides)
    parallel = config.parallel
    derived = derive(config, parallel.tp * parallel.pp * parallel.cp, source=str(config_path))
    target = describe_target(config, derived)
    source = open_source(source_text)
    if source.folder is not None and source.folder.resolve() == target.folder.resolve():
        raise ConfigError(
            f"{source_text} is the run folder of {config_path} itself; give the new run a run.folder of its own"
        )
    if found := differences(source.section, config.model, source.field_names):
        raise ConfigError(
            f"{config_path}: its model isn't that of {source.place}:\n  " + "\n  ".join(found)
            + f"\n`megascale import --show {source_text}` prints the whole section"
        )
    shapes = parameter_shapes(config.model)
    source.check(config.model, shapes)
    for warning in check_tokenizer(source, target, allows_other=allows_other_tokenizer):
        print(f"warning: {warning}")
    path = write_run(target, source, shapes, is_fresh=is_fresh)
    count = sum(Box((0,) * len(shape), shape).numel for shape in shapes.values())
    print(f"imported {count:,} parameters of {source.place} into {path}")


def describe_target(config: RunConfig, derived: Derived) -> Target:
    """What training makes of a config, the run id apart.

    Raises:
        ConfigError, DataError: as training would.
    """
    with ExitStack() as at_end:
        stream, validation = open_stream(config, derived), open_validation(config)
        at_end.callback(close_stores, [*stream.corpora, *validation])
        manifest = stream.corpora[0].manifest
        record = describe_run(config, stream, validation, read_git_commit())
        tokenizer = read_tokenizer(manifest, access_of(config.data))
        return Target(config, record, tokenizer, manifest.eos_id, file_of_tokenizer(manifest))


def check_tokenizer(source: WeightSource, target: Target, *, allows_other: bool) -> list[str]:
    """Refuses corpora whose tokens mean other texts than those that the weights were trained on.

    Returns:
        Warnings: what couldn't be compared, or was allowed.

    Raises:
        DataError: the vocabularies differ.
    """
    if target.config.model.vision is not None:  # images have no tokens
        return []
    warnings, content = [], source.tokenizer()
    if content is None:
        warnings.append(f"{source.place} has no {TOKENIZER_FILE} to compare with the corpora's")
    elif difference := compare_vocabularies(
        read_vocabulary(target.tokenizer, "the corpora's tokenizer"),
        read_vocabulary(content, f"{source.place}/{TOKENIZER_FILE}"),
    ):
        message = f"the corpora were tokenized with another tokenizer than that of {source.place}: {difference}"
        if not allows_other:
            raise DataError(
                f"{message}. Make them again: megascale data tokenize SOURCE --tokenizer"
                f" {source.place}/{TOKENIZER_FILE}; or import with --allow-other-tokenizer"
            )
        warnings.append(message)
    if source.eos_ids and target.eos_id not in source.eos_ids:
        ends = ", ".join(map(str, source.eos_ids))
        warnings.append(f"texts end with token {target.eos_id} in the corpora, with {ends} in the source")
    return warnings


def read_vocabulary(content: bytes, place: str) -> dict[int, str]:
    """The text of each token id of a `tokenizer.json`, special tokens included."""
    vocabulary = parse_tokenizer(content, place).get_vocab(with_added_tokens=True)
    return {token_id: text for text, token_id in vocabulary.items()}


def compare_vocabularies(ours: Mapping[int, str], theirs: Mapping[int, str]) -> str | None:
    """How many ids stand for other texts, with the first as an example; None when all are the same."""
    differing = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    if not differing:
        return None
    first = differing[0]
    return (f"{len(differing)} of {len(ours.keys() | theirs.keys())} ids differ; {first} is {ours.get(first)!r} in the"
            f" corpora, {theirs.get(first)!r} there")


def write_run(target: Target, source: WeightSource, shapes: Mapping[str, tuple[int, ...]], *, is_fresh: bool) -> str:
    """Makes the run folder and its checkpoint of step 0; says where it is.

    Raises:
        CheckpointError: the folder is in use or holds a run.
        SaveError: not written; a run folder that this call made says no longer that it holds a run.
    """
    config, url, folder = target.config, target.config.checkpoint.url, target.folder
    is_new = is_fresh or read_run_file(folder) is None
    record, lease = claim_run_folder(folder, LocalComm(), target.record, target.eos_id, url, is_fresh)
    try:
        store = open_run_store(folder, url, record.run_id)
        if store.steps() or store.has_quarantine():
            steps = ", ".join(map(str, store.steps()[-3:])) or "damaged"
            raise CheckpointError(
                f"{folder}: holds a run with checkpoints ({steps});"
                " set it aside with --fresh, or set another run.folder"
            )
        describe_run_folder(folder, record, target.tokenizer, target.tokenizer_file)
        note_saved(folder, 0)  # before it is, so that training doesn't begin here when this is killed half-way
        write_checkpoint(store, replace(record, lineage=source.lineage()), config, source, shapes, lease.claim)
    except LeaseLostError:
        raise
    except BaseException:
        if is_new:  # or training would begin here, with weights of its own
            for name in (RUN_FILE, SAVED_FILE):
                (folder / name).unlink(missing_ok=True)
        raise
    finally:
        lease.release()
    return str(store.path(0))


def write_checkpoint(
    store: Store, record: RunRecord, config: RunConfig, source: WeightSource, shapes: Mapping[str, tuple[int, ...]],
    claim: LeaseClaim,
) -> None:
    """Writes the checkpoint of step 0, in files that each hold some parameters with their state.

    Raises:
        SaveError: it couldn't be written; nothing of it is left.
        DataError: a value of the source isn't finite.
    """
    policy, model, token = config.checkpoint, config.model, secrets.token_hex(16)
    states = states_of(config, shapes)
    parts = [(_records(names, states), names) for names in divide(states, PART_BYTES)]
    needed_bytes = sum(file_bytes(records) + SPARE_BYTES_PER_RANK for records, _ in parts)
    state = replace(
        RunState.at_start(wandb_run_id=secrets.token_hex(8)), optimizer_scalars=start_scalars(config.precision)
    )
    with ExitStack() as on_failure:
        on_failure.callback(abandon, AbandonTask(store.place, 0, token))
        try:
            for rank, (records, names) in enumerate(parts):
                task = WriteTask(
                    store.place, 0, token, rank, policy.read_back, None if rank else needed_bytes, claim
                )
                write_part(task, RankPieces(records, _arrays(source, model, names, states)))
            commit(CommitTask(
                store.place, 0, token, len(parts), record, state, None,
                Retention(policy.keep_last, policy.keep_every_steps, policy.keep_best), claim,
            ))
        except LeaseLostError:
            raise
        except (OSError, CheckpointError) as error:
            raise SaveError(
                f"{store.path(0)}: not written: {error}. It needs {needed_bytes / MIB:.1f} MiB"
            ) from None
        on_failure.pop_all()


def start_scalars(precision: PrecisionConfig) -> dict[str, float]:
    """What `Engine.scalars` gives before the first step."""
    scaler = build_loss_scaler(precision.dtype, precision.initial_loss_scale_log2, precision.loss_scale_window_steps)
    return {"step": 0.0, **scaler_values(scaler)}


def states_of(config: RunConfig, shapes: Mapping[str, tuple[int, ...]]) -> States:
    """The kinds of state that training keeps of each parameter, master weights first, with their shapes."""
    facts = parameter_facts(config, shapes)
    return {
        name: {"master": shape}
        | state_shapes(config.optimizer, shape, group_of(name, facts[name], config.optimizer).is_matrix)
        for name, shape in shapes.items()
    }


def divide(states: States, part_bytes: int) -> list[list[str]]:
    """The names in their order, in parts that end with the parameter that fills them, its whole state counted."""
    parts, filled = [[]], 0
    for name, kinds in states.items():
        if filled >= part_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += BYTES_PER_ELEMENT * sum(map(prod, kinds.values()))
    return parts


def _records(names: list[str], states: States) -> tuple[PieceRecord, ...]:
    return tuple(
        PieceRecord(f"{kind}/{name}", shape, (0,) * len(shape), shape)
        for name in names for kind, shape in states[name].items()
    )


def _arrays(
    source: WeightSource, model: ModelConfig, names: list[str], states: States
) -> Iterator[np.ndarray]:
    """The elements of `_records`, each read when it is written."""
    for name in names:
        weight = source.read(model, name, states[name]["master"]).numpy().reshape(-1)
        for kind, shape in states[name].items():
            yield weight if kind in ("master", EMA) else np.zeros(prod(shape), np.float32)
        del weight


if __name__ == "__main__":
    serve_request(serve, sys.argv[1])
