"""From a place in a run's log to the text that was read there: any row of any step, as any rank had it."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_tools.inspect import describe_run_row
from megascale.checkpoint.folders import list_steps
from megascale.config.derive import Derived, derive
from megascale.config.load import load_config
from megascale.data.stream import Stream, open_stream
from megascale.errors import DataError
from megascale.observe.run_files import CONFIG_FILE, SESSIONS_FILE, read_json_lines, read_metrics
from megascale.parallel.layout import AXES, Layout


class ReadRun(NamedTuple):
    """A run as its folder describes it.

    Attributes:
        folder: of the run.
        stream: the rows that it reads.
        derived: of its last session.
        sessions: (completed steps at its start, layout) of each session, in their order.
        last_step: completed steps that the folder tells of.
    """

    folder: Path
    stream: Stream
    derived: Derived
    sessions: tuple[tuple[int, Layout], ...]
    last_step: int


def open_run(folder: Path) -> ReadRun:
    """Opens a run for a reader beside it; nothing in its folder is changed.

    Raises:
        DataError, ConfigError: no run there, or its corpora aren't as the run found them.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise DataError(f"{folder} has no {CONFIG_FILE}: give the folder of a run that was started")
    config = load_config(folder / CONFIG_FILE)
    sessions = tuple(
        (line["resumed_step"], Layout(**{axis: line["layout"][axis] for axis in AXES}))
        for line in read_json_lines(folder / SESSIONS_FILE)
    )
    if not sessions:
        raise DataError(f"{folder / SESSIONS_FILE} names no session: the run read nothing yet")
    derived = derive(config, sessions[-1][1].world_size, str(folder / CONFIG_FILE))
    logged = [line["step"] for line in read_metrics(folder)]
    last_step = max([*logged, *list_steps(folder), *(resumed_step for resumed_step, _ in sessions)])
    return ReadRun(folder, open_stream(config, derived), derived, sessions, last_step)


def locate(folder: Path, step: int, rank: int | None, row: int | None) -> str:
    """Which rows a step read, from which shards; with a rank and a row, the text of that row.

    Args:
        folder: of the run.
        step: as the log numbers it: the first step is 1.
        rank: one of the session that ran the step last; None: all replicas.
        row: of the rows that the rank's replica read in the step, from 0; None: all.

    Raises:
        DataError: a step that didn't run, a rank or a row that there was not, or damage.
    """
    run = open_run(folder)
    if not 1 <= step <= run.last_step:
        raise DataError(
            f"--step {step} of {folder}: its log and checkpoints tell of the steps 1 .. {run.last_step}; choose one"
        )
    number, layout = find_session(run, step)
    first_row, num_rows = run.derived.batches.first_row(step - 1), run.derived.batches.rows_of(step - 1)
    title = (
        f"step {step}: rows {first_row} .. {first_row + num_rows - 1}, dealt out to {layout.dp} replicas in session "
        f"{number} of {len(run.sessions)}"
    )
    if rank is None:
        if row is not None:
            raise DataError(f"--row {row} is counted among the rows of a rank; add --rank, of {layout.world_size}")
        parts = [run.stream.order.replica_rows(first_row, num_rows, at, layout.dp) for at in range(layout.dp)]
        replicas = np.repeat(np.arange(layout.dp), [len(part) for part in parts])
        return "\n".join([title, *list_rows(run.stream, np.concatenate(parts), replicas)])
    replica = find_replica(layout, rank, number)
    row_numbers = run.stream.order.replica_rows(first_row, num_rows, replica, layout.dp)
    ranks = [at for at in range(layout.world_size) if layout.coordinates(at)["dp"] == replica]
    title += f"; rank {rank} is of replica {replica}"
    if len(ranks) > 1:
        title += f", whose ranks {', '.join(map(str, ranks))} read the same rows"
    if row is None:
        return "\n".join([title, *list_rows(run.stream, row_numbers, np.full(len(row_numbers), replica))])
    if not 0 <= row < len(row_numbers):
        raise DataError(
            f"--row {row}: replica {replica} read the rows 0 .. {len(row_numbers) - 1} in step {step}; choose one"
        )
    return f"{title}\n{describe_run_row(run.stream, int(row_numbers[row]))}"


def find_session(run: ReadRun, step: int) -> tuple[int, Layout]:
    """The last session that ran a step, counted from 1: what it computed is what the run went on with."""
    number = max(at for at, (resumed_step, _) in enumerate(run.sessions) if resumed_step < step)
    return number + 1, run.sessions[number][1]


def find_replica(layout: Layout, rank: int, session: int) -> int:
    """The replica that a rank belongs to."""
    if not 0 <= rank < layout.world_size:
        degrees = ", ".join(f"{axis} {getattr(layout, axis)}" for axis in AXES)
        raise DataError(
            f"--rank {rank}: session {session} had the ranks 0 .. {layout.world_size - 1} ({degrees}); choose one"
        )
    return layout.coordinates(rank)["dp"]


def list_rows(stream: Stream, row_numbers: np.ndarray, replicas: np.ndarray) -> list[str]:
    """A line for each row."""
    lines = [f"{'replica':>7} {'row':>5} {'number':>12}  {'corpus':<16} {'epoch':>5}  shard and row in it"]
    within = np.arange(len(replicas)) - np.searchsorted(replicas, replicas)
    places = zip(*(array.tolist() for array in stream.order.locate(row_numbers)), strict=True)
    for replica, at, number, (corpus, epoch, shard, row) in zip(
        replicas.tolist(), within.tolist(), row_numbers.tolist(), places, strict=True
    ):
        found = stream.corpora[corpus]
        lines.append(
            f"{replica:>7} {at:>5} {number:>12}  {found.name:<16} {epoch:>5}  {found.manifest.shard(shard).name}, {row}"
        )
    return lines
