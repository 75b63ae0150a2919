"""`run.json`: which run a folder holds, and where its checkpoints lie; and whether it has saved any."""

from dataclasses import dataclass
from pathlib import Path

from megascale.checkpoint.files import read_bounded
from megascale.checkpoint.records import parse_record
from megascale.checkpoint.store import Store, open_store
from megascale.errors import CheckpointError
from megascale.observe.run_files import write_atomically

RUN_FILE = "run.json"
SAVED_FILE = "newest_saved_step"
MAX_RUN_FILE_BYTES = 4096


@dataclass(frozen=True)
class RunFile:
    """What `run.json` says: the id that ties checkpoints to this run, the token that ends a text, where checkpoints go.

    Attributes:
        url: of the object store, see `CheckpointConfig.url`.
    """

    run_id: str
    eos_id: int
    url: str | None


def read_run_file(folder: Path) -> RunFile | None:
    """Which run a folder holds, None when it holds none.

    Raises:
        CheckpointError: it can't be told.
    """
    text = read_bounded(folder / RUN_FILE, MAX_RUN_FILE_BYTES)
    return parse_record(RunFile, text, folder / RUN_FILE) if text is not None else None


def note_saved(folder: Path, step: int) -> None:
    """Notes in the run folder that a checkpoint of this step is safe."""
    write_atomically(folder / SAVED_FILE, f"{step}\n".encode())


def read_saved(folder: Path) -> int | None:
    """The step that `note_saved` noted last; None before the first.

    It chooses no checkpoint: it only tells a run that never saved from one whose checkpoints are gone or out of reach.
    """
    text = read_bounded(folder / SAVED_FILE, MAX_RUN_FILE_BYTES)
    return int(text) if text is not None and text.strip().isdigit() else None


def open_run_store(folder: Path, url: str | None, run_id: str) -> Store:
    """Where the checkpoints of a run lie: in its folder, or below the url, in a folder of its own."""
    return open_store(f"{url.rstrip('/')}/{run_id}" if url else str(folder))


def peek_run_store(folder: Path) -> Store:
    """The same for a reader beside the run, from what the run folder says.

    Raises:
        CheckpointError: the folder holds no run.
    """
    run_file = read_run_file(folder)
    if run_file is None:
        raise CheckpointError(f"{folder}: is no run folder: it has no {RUN_FILE}")
    return open_run_store(folder, run_file.url, run_file.run_id)
