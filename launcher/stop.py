"""`megascale stop`: asks a run to save and stop, or only to save, by a file in its folder; or ends it at once."""

import contextlib
import getpass
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from launcher.local import SAME_SIGNAL_S
from launcher.status import RunStatus, Standing, check_run_folder, is_ours, read_status
from megascale.checkpoint.run_file import read_saved
from megascale.errors import LaunchError, RankFailedError
from megascale.observe.console import say
from megascale.observe.run_files import write_atomically
from megascale.train.signals import SAVE_FILE, STOP_FILE

POLL_S = 1.0
SCANCEL_S = 30.0
ALIVE = (Standing.RUNNING, Standing.WAITING, Standing.SILENT)


def stop_run(run: Path, *, only_saves: bool = False, waits: bool = False, at_once: bool = False) -> None:
    """Asks a run to save and stop, to save and go on, or ends it without saving.

    A run that has already ended is left alone: that is what was asked for. No file is left in its folder, which would
    stop the next start.

    Raises:
        CheckpointError: the folder holds no run.
        LaunchError: it is another user's, nobody is there to save, or the run can't be ended from here.
        RankFailedError: while it was waited for, the run failed.
    """
    if only_saves and at_once:
        raise LaunchError("--save and --now can't go together: --now doesn't save; give one of them")
    check_run_folder(run)
    check_owner(run)
    status = read_status(run)
    if status.standing not in ALIVE:
        if only_saves:
            raise LaunchError(f"{run}: {status.standing}: nobody is there to save; its newest checkpoint is"
                              f" {_saved(status.saved_step)}")
        say(f"{run}: {status.standing} at step {max(0, status.step)}: there is nothing to stop")
        return
    if at_once:
        _end(run, status)
    else:
        _ask(run, status, only_saves=only_saves)
    if waits:
        _wait_for_save(run, status) if only_saves else _wait_for_end(run)


def check_owner(run: Path) -> None:
    """Refuses another user's folder.

    Raises:
        LaunchError: with the owner.
    """
    owner, own = run.stat().st_uid, os.getuid()
    if own not in (owner, 0):
        raise LaunchError(f"{run}: belongs to {_user(owner)}, and you are {_user(own)}; only its owner stops a run")
    if not os.access(run, os.W_OK):
        raise LaunchError(f"{run}: isn't writable, so the run can't be asked; with a job id, `scancel` still works")


def _ask(run: Path, status: RunStatus, *, only_saves: bool) -> None:
    path = run / (SAVE_FILE if only_saves else STOP_FILE)
    text = f"asked by {getpass.getuser()} on {socket.gethostname()} at {time.strftime('%Y-%m-%d %H:%M:%S %z')}\n"
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise LaunchError(f"{path}: can't be written: {error.strerror}") from None
    if only_saves:
        say(f"wrote {path}: the run saves before its next step and trains on; then the file is gone")
    else:
        say(f"wrote {path}: the run saves before its next step and stops. The file stays: `megascale launch` removes"
            " it, `megascale train` stops again until you do")
    if status.standing == Standing.WAITING:
        say(f"job {status.job_id} is still in the queue: it will see the file when it starts; --now takes it out")
    if status.standing == Standing.SILENT:
        say(f"warning: it is {status.standing} ({status.why}): perhaps nobody is there to see the file")


def _end(run: Path, status: RunStatus) -> None:
    """Ends a run without a save: its job, or the launcher on this machine."""
    if status.job_id:
        if shutil.which("scancel") is None:
            raise LaunchError(f"{run}: is job {status.job_id}, and this machine has no scancel; use a login node")
        try:
            found = subprocess.run(["scancel", status.job_id], capture_output=True, text=True, timeout=SCANCEL_S,
                                   check=False)
        except subprocess.TimeoutExpired:
            raise LaunchError(f"scancel {status.job_id}: no answer within {SCANCEL_S:g} s") from None
        if found.returncode:
            raise LaunchError(f"scancel {status.job_id}: {found.stderr.strip() or f'exit code {found.returncode}'}")
        say(f"cancelled job {status.job_id}; the newest checkpoint is {_saved(status.saved_step)}")
        return
    state = status.state
    if state is None or state.status == "ended":
        where = f"process {status.lease['pid']} on {status.lease['host']}" if status.lease else "unknown"
        raise LaunchError(f"{run}: wasn't started by `megascale launch` (its rank 0 is {where}); press Ctrl-C twice"
                          " where it was started")
    if state.host != socket.gethostname():
        raise LaunchError(f"{run}: its launcher is process {state.pid} on {state.host}; give this command there")
    if not is_ours(state.pid) or Path(f"/proc/{state.pid}").stat().st_uid != os.getuid():
        raise LaunchError(f"{run}: process {state.pid}, its launcher by {run}/launch/state.json, is gone or another"
                          " program by now: nothing was signalled")
    os.kill(state.pid, signal.SIGTERM)
    time.sleep(SAME_SIGNAL_S + 0.2)  # signals within a second count as one
    with contextlib.suppress(ProcessLookupError):
        os.kill(state.pid, signal.SIGTERM)
    say(f"ended process {state.pid}; the newest checkpoint is {_saved(status.saved_step)}")


def _wait_for_end(run: Path) -> None:
    """Waits until the run has ended, and says what it does meanwhile."""
    told = ""
    while (status := read_status(run)).standing in (Standing.RUNNING, Standing.WAITING):
        phase = f", {status.state.phase}" if status.state and status.state.phase else ""
        news = f"{status.standing}: step {max(0, status.step)}{phase}"
        if news != told:
            say(news)
            told = news
        time.sleep(POLL_S)
    say(f"{run}: {status.standing}; the newest checkpoint is {_saved(status.saved_step)}")
    if status.standing in (Standing.FAILED, Standing.SILENT):
        raise RankFailedError(f"{run}: {status.standing}: {status.why}; `megascale logs {run} --errors`")


def _wait_for_save(run: Path, before: RunStatus) -> None:
    """Waits until the save that was asked for is safe, or the run has ended."""
    while (run / SAVE_FILE).exists() or read_saved(run) == before.saved_step:
        status = read_status(run)
        if status.standing not in (Standing.RUNNING, Standing.WAITING):
            raise RankFailedError(f"{run}: {status.standing} before it saved: {status.why}")
        time.sleep(POLL_S)
    say(f"{run}: saved: {_saved(read_saved(run))}")


def _saved(step: int | None) -> str:
    return "none" if step is None else f"that of step {step}"


def _user(number: int) -> str:
    try:
        return f"{pwd.getpwuid(number).pw_name} ({number})"
    except KeyError:
        return f"user {number}"
