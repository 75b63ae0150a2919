"""`megascale status`: where a run stands, from the files that it leaves; nothing is asked of the run itself."""

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from launcher.submit.plan import MAX_NODE_FAULTS
from launcher.supervise.records import (
    LAUNCH_FOLDER,
    LOGS_FOLDER,
    STATE_FILE,
    AttemptRecord,
    LaunchState,
    excluded_nodes,
    read_attempts,
    read_node_faults,
    read_state,
)
from megascale.checkpoint.lease import LEASE_NAME, STALE_S
from megascale.checkpoint.run_file import RUN_FILE, read_saved
from megascale.config.load import read_yaml
from megascale.errors import EXIT_CRASH_LOOP, EXIT_OK, EXIT_STOPPED, CheckpointError, ConfigError, redact
from megascale.observe.run_files import CONFIG_FILE, GOODPUT_FILE, METRICS_FILE, read_json

SILENT_S = 30.0
"""A state that is written every second or two and is older than this has nobody who writes it."""
SQUEUE_S = 10.0
TAIL_BYTES = 1 << 17
ATTEMPTS_SHOWN = 8
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Standing(StrEnum):
    """Where a run stands, in words."""

    RUNNING = "running"
    WAITING = "waiting in the queue"
    STOPPED = "stopped"
    FAILED = "failed"
    FINISHED = "finished"
    SILENT = "silent"


@dataclass(frozen=True)
class QueueEntry:
    """A job in the scheduler's queue.

    Attributes:
        state: SLURM's word, such as PENDING.
        reason: why it waits.
        start: when it is expected to start, `N/A` where that isn't known.
    """

    state: str
    reason: str
    start: str


@dataclass(frozen=True)
class RunStatus:
    """All that `megascale status` knows.

    Attributes:
        last_step: of the config; None where there is none.
        saved_step: newest checkpoint that is safe, None before the first.
        metrics: last line of a training step.
        job_id: of the scheduler, empty for none.
        queue: None when there is no job, no scheduler, or it doesn't know the job any more.
        lease: who holds the run folder, None for nobody.
    """

    run: str
    standing: Standing
    why: str
    step: int
    last_step: int | None
    saved_step: int | None
    metrics: dict[str, Any]
    job_id: str
    queue: QueueEntry | None
    state: LaunchState | None
    lease: dict[str, Any] | None
    attempts: list[AttemptRecord] = field(default_factory=list)
    excluded: dict[str, str] = field(default_factory=dict)
    goodput_fraction: float | None = None
    logs: str = ""


def print_status(run: Path, *, as_json: bool) -> None:
    """Prints where a run stands.

    Raises:
        CheckpointError: the folder holds no run.
    """
    status = read_status(run)
    print(json.dumps(asdict(status), indent=2) if as_json else describe(status))


def read_status(run: Path, *, asks_scheduler: bool = True) -> RunStatus:
    """Gathers what the files of a run say.

    Raises:
        CheckpointError: the folder holds no run.
    """
    check_run_folder(run)
    state, lease, now_s = read_state(run), read_lease(run), time.time()
    job_id = newest_job(run, state)
    queue = ask_queue(job_id) if asks_scheduler and job_id else None
    metrics = last_train_line(run / METRICS_FILE)
    last_step, saved = max_steps(run), read_saved(run)
    step = max(metrics.get("step", -1), state.step if state else -1, saved if saved is not None else -1)
    is_new = bool(job_id) and (state is None or state.job_id != job_id)
    standing, why = judge(
        None if is_new else state, age_s=state_age(run, state, now_s), is_held=lease is not None, queue=queue,
        is_complete=last_step is not None and step >= last_step, job_id=job_id,
    )
    goodput = read_json(run / GOODPUT_FILE)
    return RunStatus(
        str(run), standing, why, step, last_step, saved, metrics, job_id, queue, state, lease, read_attempts(run),
        excluded_nodes(read_node_faults(run, now_s), MAX_NODE_FAULTS) | (state.excluded if state else {}),
        goodput.get("goodput_fraction") if isinstance(goodput, dict) else None, where_logs_are(run, state, job_id),
    )


def judge(
    state: LaunchState | None, *, age_s: float, is_held: bool, queue: QueueEntry | None, is_complete: bool, job_id: str
) -> tuple[Standing, str]:
    """Where a run stands, and why that is thought.

    Args:
        state: of the newest launch; None when there was none, or it has not begun.
        age_s: seconds since the state was written.
        is_held: whether a living process holds the run folder.
        is_complete: whether the last step is taken.
    """
    if queue and queue.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"):
        return Standing.WAITING, f"job {job_id}: {queue.reason}, expected to start: {queue.start}"
    if state is None or (state.status == "ended" and is_held):
        if is_held or queue:
            return Standing.RUNNING, f"job {job_id} is {queue.state.lower()}" if queue else "the run folder is in use"
        return (Standing.FINISHED, "") if is_complete else (Standing.STOPPED, "nobody holds the run folder")
    if state.status == "ended":
        if state.exit_code == EXIT_OK and is_complete:
            return Standing.FINISHED, ""
        if state.exit_code in (EXIT_OK, EXIT_STOPPED):
            return Standing.STOPPED, "saved; the same launch goes on"
        why = "given up: attempts in a row made no progress" if state.exit_code == EXIT_CRASH_LOOP else state.last_fault
        return Standing.FAILED, f"exit code {state.exit_code}{': ' if why else ''}{why}"
    if age_s <= SILENT_S or is_held:
        return Standing.RUNNING, state.status
    if state.status == "requeued":
        unknown = "job {} is not in the queue any more" if shutil.which("squeue") else "job {} was requeued"
        return Standing.SILENT, unknown.format(job_id)
    gone = f", and the scheduler doesn't know job {job_id}" if job_id and shutil.which("squeue") and not queue else ""
    return Standing.SILENT, f"{state.status}, but its controller said nothing for {duration(age_s)}{gone}"


def describe(status: RunStatus) -> str:
    """A run's status for people; the first line says it all."""
    lines = [f"{status.run}: {status.standing}" + (f" ({status.why})" if status.why else "") + _progress(status)]
    state = status.state
    if state and state.status != "ended":
        spares = f", spares {', '.join(state.spares)}" if state.spares else ""
        lines.append(f"nodes: {', '.join(state.nodes) or 'none yet'}{spares}; attempt {state.life}/{state.attempt},"
                     f" phase {state.phase or 'unknown'}")
    lines += _speed(status)
    saved = "none yet" if status.saved_step is None else f"step {status.saved_step}"
    lines.append(f"newest checkpoint: {saved}")
    if status.goodput_fraction is not None:
        lines.append(f"goodput: {100 * status.goodput_fraction:.1f} % of the wall time")
    if state:
        lines += [f"straggler: {line}" for line in state.stragglers]
    lines += _faults(status.attempts)
    lines += [f"left out: {node}: {reason}" for node, reason in status.excluded.items()]
    lines += [f"logs: {status.logs}"] if status.logs else []
    return redact("\n".join([*lines, f"next: {_advice(status)}"]))


def check_run_folder(run: Path) -> None:
    """Refuses a folder that no run was ever started or submitted in.

    Raises:
        CheckpointError: it is none, or can't be read.
    """
    try:
        if any((run / name).exists() for name in (RUN_FILE, LAUNCH_FOLDER)):
            return
    except OSError as error:
        raise CheckpointError(f"{run}: can't be read: {error.strerror}") from None
    what = f"it has neither {RUN_FILE} nor {LAUNCH_FOLDER}/" if run.is_dir() else "there is no such folder"
    raise CheckpointError(f"{run}: is no run folder: {what}")


def read_lease(run: Path) -> dict[str, Any] | None:
    """Who holds the run folder, None for nobody alive; only looks, and never takes the lock."""
    owner = read_json(run / LEASE_NAME)
    if not isinstance(owner, dict) or not isinstance(owner.get("pid"), int):
        return None
    boot_id = BOOT_ID.read_text().strip() if BOOT_ID.exists() else socket.gethostname()
    if owner.get("boot_id") == boot_id:
        return owner if is_ours(owner["pid"]) else None
    try:
        return owner if time.time() - (run / LEASE_NAME).stat().st_mtime < STALE_S else None
    except OSError:
        return None


def is_ours(pid: int) -> bool:
    """Whether a process of this machine is one of this program's."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    return any(word.split(".")[0] in ("launcher", "megascale") or Path(word).name == "megascale" for word in words)


def newest_job(run: Path, state: LaunchState | None) -> str:
    """The scheduler's id of the newest job: that of the newest submission, unless a launch began after it."""
    jobs = [read_json(path) for path in sorted((run / LAUNCH_FOLDER).glob("*/job.json"))]
    jobs = [job for job in jobs if isinstance(job, dict) and job.get("job_id")]
    newest = max(jobs, key=lambda job: job.get("submitted_s", 0.0), default=None)
    if newest and (state is None or newest.get("submitted_s", 0.0) > state.unix_s):
        return str(newest["job_id"])
    return state.job_id if state else ""


def ask_queue(job_id: str) -> QueueEntry | None:
    """What the scheduler says of a job; None where there is no scheduler, it doesn't answer, or has forgotten it."""
    if shutil.which("squeue") is None:
        return None
    try:
        found = subprocess.run(["squeue", "-h", "-j", job_id, "-o", "%T|%r|%S"], capture_output=True, text=True,
                               timeout=SQUEUE_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    entries = [QueueEntry(*line.split("|")) for line in found.stdout.splitlines() if line.count("|") == 2]
    # A job array has a line for each link: the one that runs says more than those that wait for it.
    return min(entries, key=lambda entry: entry.state == "PENDING", default=None)


def max_steps(run: Path) -> int | None:
    """The last step of a run, by its config or that of its newest submission."""
    for path in (run / CONFIG_FILE, *sorted((run / LAUNCH_FOLDER).glob(f"*/{CONFIG_FILE}"), reverse=True)):
        try:
            steps = read_yaml(path)["train"]["max_steps"]
        except (ConfigError, KeyError, TypeError):
            continue
        return steps if isinstance(steps, int) else None
    return None


def last_train_line(path: Path) -> dict[str, Any]:
    """The newest whole line of a training step in `metrics.jsonl`; empty where there is none near its end."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and values.get("kind") == "train" and isinstance(values.get("step"), int):
            return values
    return {}


def state_age(run: Path, state: LaunchState | None, now_s: float) -> float:
    """Seconds since the state was written, by the clock of its writer or of the file system, whichever is later."""
    if state is None:
        return float("inf")
    try:
        written_s = max(state.unix_s, (run / LAUNCH_FOLDER / STATE_FILE).stat().st_mtime)
    except OSError:
        written_s = state.unix_s
    return max(0.0, now_s - written_s)


def where_logs_are(run: Path, state: LaunchState | None, job_id: str) -> str:
    """The newest folder of logs, and the job's own log."""
    places = [state.log_folder] if state and state.log_folder else []
    job_log = run / LOGS_FOLDER / f"slurm_{job_id}.log"
    return ", ".join([*places, *([str(job_log)] if job_id and job_log.exists() else [])])


def duration(seconds: float) -> str:
    """A time in the largest two units: `12 s`, `3 min 20 s`, `5 h 10 min`, `2 d 3 h`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    for size, name, low_size, low in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            return f"{seconds // size:.0f} {name} {seconds % size // low_size:.0f} {low}"
    return ""


def _progress(status: RunStatus) -> str:
    if status.step < 0:
        return "; no step yet"
    of = f" of {status.last_step} ({100 * status.step / status.last_step:.1f} %)" if status.last_step else ""
    return f"; step {status.step}{of}"


def _speed(status: RunStatus) -> list[str]:
    line = status.metrics
    parts = [f"loss {line['loss']:.4f}"] if isinstance(line.get("loss"), float) else []
    if isinstance(line.get("tokens_per_s"), int | float):
        parts.append(f"{line['tokens_per_s']:,.0f} tokens/s")
    if status.standing == Standing.RUNNING and isinstance(line.get("eta_s"), int | float):
        parts.append(f"about {duration(line['eta_s'])} left")
    return [f"last logged step {line['step']}: {', '.join(parts)}"] if parts else []


def _faults(attempts: Sequence[AttemptRecord]) -> list[str]:
    """The attempts that ended, newest last, with how long the next one took to begin."""
    lines = []
    for place, attempt in list(enumerate(attempts))[-ATTEMPTS_SHOWN:]:
        parts = [f"steps {max(0, attempt.began_step)} to {max(0, attempt.reached_step, attempt.ended_step)}"]
        if attempt.culprit:
            parts.append(f"at fault: {attempt.culprit}")
        if attempt.detected_s is not None:
            parts.append(f"detected after {attempt.detected_s:.1f} s")
        if attempt.down_s is not None:
            parts.append(f"all ranks down {attempt.down_s:.1f} s later")
        if place + 1 < len(attempts):
            parts.append(f"next attempt {duration(max(0.0, attempts[place + 1].began_s - attempt.ended_s))} later")
        reason = f": {attempt.reason.splitlines()[0]}" if attempt.reason else ""
        lines.append(f"attempt {attempt.life}/{attempt.attempt}: {attempt.outcome}; {', '.join(parts)}{reason}")
    hidden = len(attempts) - len(lines)
    return ([f"{hidden} earlier attempts: {LAUNCH_FOLDER}/attempts.jsonl"] if hidden else []) + lines


def _advice(status: RunStatus) -> str:
    run = status.run
    match status.standing:
        case Standing.RUNNING:
            return f"`megascale logs {run} --follow` to watch, `megascale stop {run}` to save and stop"
        case Standing.WAITING:
            return f"wait, or `megascale stop {run} --now` to take job {status.job_id} out of the queue"
        case Standing.FINISHED:
            return f"`megascale report {run}`, `megascale export {run} --format hf`"
        case Standing.FAILED:
            return f"`megascale logs {run} --errors`; then the same launch command resumes"
        case Standing.STOPPED:
            return "the same command that started it goes on"
        case Standing.SILENT:
            return (f"see whether the job or its machine is still there (`megascale logs {run}`); if not, the same"
                    " launch command resumes")
