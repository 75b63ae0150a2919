"""The run folder: claimed by one job, known by one id, and explaining itself."""

import os
import secrets
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

from megascale.checkpoint.comm import Comm, run_on_rank_zero
from megascale.checkpoint.folders import set_aside
from megascale.checkpoint.index import RunRecord
from megascale.checkpoint.lease import RunLease
from megascale.checkpoint.records import to_json
from megascale.checkpoint.run_file import RUN_FILE, SAVED_FILE, RunFile, read_run_file
from megascale.config.dump import to_yaml
from megascale.data.manifest import Manifest
from megascale.errors import CheckpointError
from megascale.observe.run_files import (
    BASELINES_FILE,
    CONFIG_FILE,
    GOODPUT_FILE,
    GOODPUT_FOLDER,
    METRICS_FILE,
    REPORT_FILE,
    SAMPLE_FILE,
    SESSIONS_FILE,
    SKIPS_FILE,
    write_atomically,
)
from megascale.parallel.supervision import LIFE_VARIABLE

TOKENIZER_FILE = "tokenizer.json"
OWN_FILES = (
    RUN_FILE, SAVED_FILE, METRICS_FILE, SESSIONS_FILE, SKIPS_FILE, BASELINES_FILE, SAMPLE_FILE, REPORT_FILE,
    GOODPUT_FILE, GOODPUT_FOLDER, "wandb",
)
"""What belongs to one run and not to the folder."""


def claim_run_folder(
    folder: Path, comm: Comm, record: RunRecord, eos_id: int, url: str | None, is_fresh: bool
) -> tuple[RunRecord, RunLease | None]:
    """Takes the run folder for this job and gives the record the folder's run id, or a new one. Every rank calls it.

    Args:
        eos_id: the token that ends a text, kept for those who generate text from the run.
        url: of the object store that checkpoints go to, None for the run folder itself.
        is_fresh: set the run that the folder holds aside, its checkpoints and metrics included.

    Returns:
        The record with its run id, and on rank 0 the lease, which lasts until it is released or the process ends.

    Raises:
        CheckpointError: the folder is in use, can't be written, or isn't shared by all ranks.
    """
    leases: list[RunLease] = []
    run_on_rank_zero(comm, lambda: leases.append(_take(folder, eos_id, url, is_fresh)))
    run_file = read_run_file(folder)
    if run_file is not None and run_file.url != url:
        raise CheckpointError(
            f"{folder / RUN_FILE}: this run's checkpoints go to {run_file.url or 'its own folder'}, but"
            f" checkpoint.url = {url}; put it back, or begin a run of its own with --fork"
        )
    if not all(comm.control_gather(int(run_file is not None))):
        raise CheckpointError(f"{folder / RUN_FILE}: rank 0 wrote it, another rank can't read it; all must share it")
    return replace(record, run_id=run_file.run_id), leases[0] if leases else None


def read_git_commit() -> str | None:
    """The commit of the checkout that this code runs from, `-dirty` when files differ; None outside a checkout."""
    package = Path(__file__).parent
    command = ["git", "-C", str(package), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return shown.stdout.strip() or None


def describe_run_folder(folder: Path, record: RunRecord, tokenizer: bytes, file: str = TOKENIZER_FILE) -> None:
    """Puts the resolved config and the tokenizer, or the names of classes, beside the checkpoints, so that the folder
    explains itself.
    """
    write_atomically(folder / CONFIG_FILE, to_yaml(record.config).encode())
    write_atomically(folder / file, tokenizer)


def file_of_tokenizer(manifest: Manifest) -> str:
    """The name in the run folder of what `Manifest.tokenizer_place` names."""
    return manifest.index.tokenizer_file if manifest.holds_images else TOKENIZER_FILE


def _take(folder: Path, eos_id: int, url: str | None, is_fresh: bool) -> RunLease:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: can't make the run folder: {error.strerror}; set run.folder") from None
    lease = RunLease.take(folder, life=os.environ.get(LIFE_VARIABLE, ""))
    if is_fresh:
        set_aside(folder, OWN_FILES)
    if read_run_file(folder) is None:
        made = RunFile(run_id=secrets.token_hex(8), eos_id=eos_id, url=url)
        write_atomically(folder / RUN_FILE, to_json(asdict(made)))
    return lease
