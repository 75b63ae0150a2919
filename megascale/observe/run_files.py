"""The files of a run folder that observing a run writes or reads: names, atomic writes, tolerant reads."""

import json
import os
from collections.abc import Container, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
SESSIONS_FILE = "sessions.jsonl"
SKIPS_FILE = "data_skips.jsonl"
BASELINES_FILE = "baselines.json"
SAMPLE_FILE = "sample.txt"
GOODPUT_FILE = "goodput.json"
GOODPUT_FOLDER = "goodput"
REPORT_FILE = "report.html"


@dataclass(frozen=True)
class Session:
    """One start of a run: the lineage of a run is the list of its sessions.

    Attributes:
        unix_s: wall-clock time of the start.
        resumed_step: completed steps in the checkpoint that it continued; 0 for a fresh start.
        world_size: number of ranks.
        layout: degrees by axis, such as `{"dp": 2}`, plus what else places the state, such as `zero_stage`.
        versions: version by package, such as `{"torch": "2.13.0"}`.
        git_commit: commit of the code when it runs from a checkout, None otherwise.
        facts: what else the report shows of the run, such as `{"parameters": "3.2 M"}`.
        news: the turn that the run took here: what was allowed to change, or which run it forked; empty for none.
    """

    unix_s: float
    resumed_step: int
    world_size: int
    layout: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    git_commit: str | None = None
    facts: dict[str, str] = field(default_factory=dict)
    news: str = ""


def append_session(run_folder: Path, session: Session) -> None:
    """Adds a line to `sessions.jsonl`."""
    append_line(run_folder / SESSIONS_FILE, asdict(session))


@dataclass(frozen=True)
class SkippedRows:
    """Rows of one step that were masked, because a shard couldn't be read.

    Attributes:
        step: number of the step, from 1, as `metrics.jsonl` counts them.
        rank: that read them, and leads its replica.
        corpus: name of the corpus.
        shard: its path or url.
        reason: what the reader said.
        rows: their row numbers.
    """

    step: int
    rank: int
    corpus: str
    shard: str
    reason: str
    rows: tuple[int, ...]


def append_skips(run_folder: Path, skipped: SkippedRows) -> None:
    """Adds a line to `data_skips.jsonl`. A step taken again after a resume adds its lines again."""
    append_line(run_folder / SKIPS_FILE, asdict(skipped))


def append_line(path: Path, values: dict) -> None:
    """Adds a line; a torn last line of a crashed session is closed first."""
    with open(path, "ab+") as file:
        if file.tell() and _last_byte(file) != b"\n":
            file.write(b"\n")
        file.write((json.dumps(values) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


@dataclass(frozen=True)
class BaselineFit:
    """N-gram models fitted on the tokens that the run had read at one step, evaluated on its validation rows.

    Attributes:
        step: completed steps of the run when it had read those tokens.
        num_tokens: label tokens that the models were fitted on.
        losses: nats per label token by name of the model, such as `{"bigram": 4.1, "trigram": 3.7}`.
    """

    step: int
    num_tokens: int
    losses: dict[str, float]


def write_baselines(run_folder: Path, fits: Iterable[BaselineFit]) -> Path:
    """Writes `baselines.json`, which the report draws: one fit as a level, several as a line."""
    path = run_folder / BASELINES_FILE
    write_atomically(path, (json.dumps([asdict(fit) for fit in fits], indent=2) + "\n").encode())
    return path


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file so that a crash leaves the old or the new content, never a mixture."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json_lines(path: Path) -> Iterator[dict]:
    """Yields the objects of a JSON-lines file; a missing file has none, and a line that a crash tore is left out."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value


def read_json(path: Path) -> Any:
    """The content of a JSON file, None when it is missing or damaged: the report shows what there is."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def read_config(run_folder: Path) -> dict[str, Any]:
    """The config that the run was started with, resolved; empty when the file is missing."""
    path = run_folder / CONFIG_FILE
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return yaml.safe_load(text) or {}


def read_metrics(run_folder: Path, kinds: Container[str] = ("train", "eval")) -> Iterator[dict]:
    """Yields the lines of `metrics.jsonl` that are whole and of the kinds asked for."""
    for line in read_json_lines(run_folder / METRICS_FILE):
        if line.get("kind") in kinds and isinstance(line.get("step"), int):
            yield line


def _last_byte(file) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)
