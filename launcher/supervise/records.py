"""What a launch leaves in the run folder: attempts, faults of nodes, and where it stands now.

`launch/attempts.jsonl` and `launch/nodes.jsonl` only grow; `launch/state.json` is replaced every second or two. The
files outlive a job, so that the next life of a run knows what happened to the last one.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path

from megascale.observe.run_files import append_line, read_json, read_json_lines, write_atomically

LAUNCH_FOLDER = "launch"
LOGS_FOLDER = "logs"
ATTEMPTS_FILE = "attempts.jsonl"
NODES_FILE = "nodes.jsonl"
STATE_FILE = "state.json"
NODE_FAULT_DAYS = 7
"""A node's faults are forgotten after so many days: it may have been mended."""


class Outcome(StrEnum):
    """How an attempt ended."""

    DONE = "done"  # the last step is taken
    STOPPED = "stopped"  # as asked; saved
    FAILED = "failed"  # a rank died or gave up
    HUNG = "hung"
    NODE_LOST = "node lost"
    REFUSED = "refused"  # bad input: another attempt would end the same


@dataclass(frozen=True)
class AttemptRecord:
    """One start of all ranks, and how it ended.

    Attributes:
        launch: folder of the launch in `launch/`: what a user submitted once.
        life: the job's life, such as `1234.0` (job id and restart) or `local-20261121-1930-ab12`.
        attempt: number within the life, from 0.
        began_s, ended_s: wall-clock times.
        nodes: that trained, first the one of rank 0.
        began_step, ended_step: newest saved step before and after; -1 for none.
        reached_step: last completed step that a heartbeat told of, -1 for none.
        outcome: an `Outcome`.
        culprit: the rank, node or link at fault, such as `rank 3 on node2`; empty when nobody is.
        reason: one line for people.
        detected_s: seconds from the fault's first sign (the death, or the last progress) to its detection; None where
            nothing went wrong.
        down_s: seconds from the detection to the moment when all ranks were gone; None likewise.
        first_step_s: wall-clock time at which its first step was taken; None when none was.
    """

    launch: str
    life: str
    attempt: int
    began_s: float
    ended_s: float
    nodes: tuple[str, ...]
    began_step: int
    ended_step: int
    reached_step: int
    outcome: str
    culprit: str = ""
    reason: str = ""
    detected_s: float | None = None
    down_s: float | None = None
    first_step_s: float | None = None


@dataclass(frozen=True)
class NodeFault:
    """Something that went wrong on a node.

    Attributes:
        kind: `preflight` (the node is left out at once) or `run` (it is left out at the second).
    """

    node: str
    unix_s: float
    kind: str
    reason: str
    life: str


@dataclass(frozen=True)
class LaunchState:
    """Where a launch stands, for `megascale status`.

    Attributes:
        life: see `AttemptRecord`.
        status: preflight, starting, running, stopping, restarting, requeued, ended.
        unix_s: when this was written.
        host, pid: of the controller.
        job_id: of the scheduler, empty for none.
        nodes, spares: names.
        excluded: nodes left out, with the reason.
        step, phase: of rank 0.
        stragglers: lines for people.
        last_fault: one line, empty for none.
        log_folder: of the present attempt.
        exit_code: when it has ended.
    """

    life: str
    status: str
    unix_s: float
    host: str
    pid: int
    job_id: str = ""
    attempt: int = 0
    nodes: tuple[str, ...] = ()
    spares: tuple[str, ...] = ()
    excluded: dict[str, str] = field(default_factory=dict)
    step: int = -1
    phase: str = ""
    stragglers: tuple[str, ...] = ()
    last_fault: str = ""
    log_folder: str = ""
    exit_code: int | None = None


def append_attempt(run_folder: Path, record: AttemptRecord) -> None:
    """Adds an attempt that has ended."""
    append_line(_launch_file(run_folder, ATTEMPTS_FILE), asdict(record))


def read_attempts(run_folder: Path, launch: str | None = None) -> list[AttemptRecord]:
    """All attempts that have ended, or those of one launch, oldest first; a torn line is left out."""
    lines = read_json_lines(run_folder / LAUNCH_FOLDER / ATTEMPTS_FILE)
    attempts = [AttemptRecord(**line | {"nodes": tuple(line["nodes"])}) for line in lines]
    return [attempt for attempt in attempts if launch in (None, attempt.launch)]


def append_node_fault(run_folder: Path, fault: NodeFault) -> None:
    """Remembers a node's fault."""
    append_line(_launch_file(run_folder, NODES_FILE), asdict(fault))


def read_node_faults(run_folder: Path, now_s: float | None = None) -> list[NodeFault]:
    """The faults of nodes that are not forgotten yet, oldest first."""
    oldest_s = (time.time() if now_s is None else now_s) - NODE_FAULT_DAYS * 86400
    faults = [NodeFault(**line) for line in read_json_lines(run_folder / LAUNCH_FOLDER / NODES_FILE)]
    return [fault for fault in faults if fault.unix_s >= oldest_s]


def excluded_nodes(faults: Sequence[NodeFault], max_faults: int) -> dict[str, str]:
    """Nodes to leave out: name -> why. One that failed its pre-flight, or had `max_faults` faults in runs."""
    excluded = {}
    for node in dict.fromkeys(fault.node for fault in faults):
        own = [fault for fault in faults if fault.node == node]
        at_once = [fault for fault in own if fault.kind == "preflight"]
        if at_once:
            excluded[node] = at_once[-1].reason
        elif len(own) >= max_faults:
            excluded[node] = f"{len(own)} faults, the last: {own[-1].reason}"
    return excluded


def write_state(run_folder: Path, state: LaunchState) -> None:
    """Replaces the state."""
    content = (json.dumps(asdict(state), indent=1) + "\n").encode()
    write_atomically(_launch_file(run_folder, STATE_FILE), content)


def read_state(run_folder: Path) -> LaunchState | None:
    """Where the newest launch stands; None when there was none, or its file can't be read."""
    values = read_json(run_folder / LAUNCH_FOLDER / STATE_FILE)
    if not isinstance(values, dict):
        return None
    lists = {name: tuple(values.get(name) or ()) for name in ("nodes", "spares", "stragglers")}
    try:
        return LaunchState(**values | lists)
    except TypeError:  # written by another version
        return None


def _launch_file(run_folder: Path, name: str) -> Path:
    folder = run_folder / LAUNCH_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name
