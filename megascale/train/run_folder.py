"""The run folder: claimed by one job, known by one id, and explaining itself."""

import json
import secrets
from dataclasses import replace
from pathlib import Path

from megascale.checkpoint.comm import run_on_rank_zero
from megascale.checkpoint.folders import set_aside_checkpoints
from megascale.checkpoint.index import RunRecord
from megascale.checkpoint.lease import RunLease
from megascale.config.dump import to_yaml
from megascale.errors import CheckpointError
from megascale.observe.run_files import CONFIG_FILE, METRICS_FILE, SESSIONS_FILE, write_atomically
from megascale.parallel.mesh import Mesh

RUN_FILE = "run.json"
TOKENIZER_FILE = "tokenizer.json"


def claim_run_folder(
    folder: Path, mesh: Mesh, record: RunRecord, is_fresh: bool
) -> tuple[RunRecord, RunLease | None]:
    """Takes the run folder for this job and gives the record the folder's run id, or a new one. Every rank calls it.

    Args:
        is_fresh: set the run that the folder holds aside, its checkpoints and metrics included.

    Returns:
        The record with its run id, and on rank 0 the lease, which lasts until it is released or the process ends.

    Raises:
        CheckpointError: the folder is in use, can't be written, or isn't shared by all ranks.
    """
    leases: list[RunLease] = []
    run_on_rank_zero(mesh, lambda: leases.append(_take(folder, is_fresh)))
    run_id = read_run_id(folder)
    if not mesh.all_true(run_id is not None):
        raise CheckpointError(f"{folder / RUN_FILE}: rank 0 wrote it, another rank can't read it; all must share it")
    return replace(record, run_id=run_id), leases[0] if leases else None


def read_run_id(folder: Path) -> str | None:
    """The id of the run that a folder holds, None when it holds none."""
    try:
        return str(json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))["run_id"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / RUN_FILE}: can't be read: {error}; restore it, or use --fresh") from None


def describe_run_folder(folder: Path, record: RunRecord, tokenizer_path: Path) -> None:
    """Puts the resolved config and the tokenizer beside the checkpoints, so that the folder explains itself."""
    write_atomically(folder / CONFIG_FILE, to_yaml(record.config).encode())
    write_atomically(folder / TOKENIZER_FILE, tokenizer_path.read_bytes())


def _take(folder: Path, is_fresh: bool) -> RunLease:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: can't make the run folder: {error.strerror}; set run.folder") from None
    lease = RunLease.take(folder)
    if is_fresh:
        set_aside_run(folder)
    if read_run_id(folder) is None:
        write_atomically(folder / RUN_FILE, json.dumps({"run_id": secrets.token_hex(8)}).encode())
    return lease


def set_aside_run(folder: Path) -> None:
    """Makes room for a fresh start: the old run's checkpoints and logs are moved away, and nothing is deleted."""
    target = set_aside_checkpoints(folder) or folder
    for name in (METRICS_FILE, SESSIONS_FILE, "wandb"):
        if target != folder and (folder / name).exists():
            (folder / name).rename(target / name)
    (folder / RUN_FILE).unlink(missing_ok=True)
