"""Whether a run folder is this user's to launch into, and whether another launch lives in it."""

import contextlib
import fcntl
import os
import pwd
import shlex
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path

from launcher.submit.snapshot import newest_job
from launcher.supervise.records import read_state
from megascale.checkpoint.lease import LEASE_NAME, STALE_S
from megascale.errors import LaunchError
from megascale.observe.run_files import read_json
from megascale.train.signals import SAVE_FILE, STOP_FILE

FRESH_S = 60.0
"""A launch that wrote its state within so many seconds may live; it writes every second or two."""
ENDED = "ended"


def check_run_folder(folder: Path) -> None:
    """Makes sure that the folder is, or can become, this user's alone to write to. Writes nothing.

    Raises:
        LaunchError: another user's, writable by everybody, not writable, or no folder.
    """
    place = folder
    while not place.exists():
        if place.is_symlink():
            raise LaunchError(f"{place}: is a link to nothing, so the run folder {folder} can't be made")
        place = place.parent
    info = place.stat()
    who = f"owner {_user_name(info.st_uid)}, mode {stat.S_IMODE(info.st_mode):04o}"
    if not stat.S_ISDIR(info.st_mode):
        raise LaunchError(f"{place}: is not a folder, so it can't hold the run; give another run.folder")
    if place == folder and info.st_uid != os.getuid():
        raise LaunchError(f"{folder}: is another user's folder ({who}), and you are {_user_name(os.getuid())}; give a"
                          " run.folder of your own")
    if place == folder and info.st_mode & stat.S_IWOTH:
        raise LaunchError(f"{folder}: anybody may write to it ({who}), and its scripts and plan are run as you; chmod"
                          f" o-w {folder}")
    if not os.access(place, os.W_OK | os.X_OK):
        raise LaunchError(f"{folder}: can't be written: {place} has {who}, and you are {_user_name(os.getuid())}; give"
                          " a run.folder where you may write")


def check_not_live(folder: Path, job_is_live: Callable[[str], bool] | None, now_s: float | None = None) -> None:
    """Refuses a second launch on a live run.

    Args:
        job_is_live: asks the scheduler about a job id; None where there is no scheduler to ask.

    Raises:
        LaunchError: a job or launch of the run waits or runs, or something holds its lease.
    """
    now_s = time.time() if now_s is None else now_s
    state = read_state(folder)
    jobs = [newest_job(folder)]
    if state is not None and state.status != ENDED:
        jobs.append(state.job_id)
        is_fresh = now_s - state.unix_s < FRESH_S
        if is_fresh and not _is_over(state.host, state.pid, state.job_id, job_is_live):
            who = f"job {state.job_id}" if state.job_id else f"process {state.pid} on {state.host}"
            raise LaunchError(_refusal(folder, f"{who} ({state.status}, step {state.step})", state.job_id))
    for job in dict.fromkeys(filter(None, jobs)):
        if job_is_live is not None and job_is_live(job):
            raise LaunchError(_refusal(folder, f"job {job}, which waits or runs", job))
    holder = lease_holder(folder, now_s)
    if holder:
        raise LaunchError(_refusal(folder, holder, ""))


def lease_holder(folder: Path, now_s: float) -> str | None:
    """Who holds the lease of a run folder, as far as can be seen without taking it; None when nobody seems to."""
    path = folder / LEASE_NAME
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        is_ours = _try_lock(descriptor)
        info = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    owner = read_json(path)
    if not isinstance(owner, dict):
        return None if is_ours else "another process"
    is_elsewhere = owner.get("host") != socket.gethostname()
    if is_ours is False or (is_elsewhere and now_s - info.st_mtime < STALE_S):
        return f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('started')}"
    return None


def remove_requests(folder: Path) -> None:
    """Removes the files that asked an earlier launch to stop or save: they would stop this one."""
    for name in (STOP_FILE, SAVE_FILE):
        (folder / name).unlink(missing_ok=True)


def _is_over(host: str, pid: int, job_id: str, job_is_live: Callable[[str], bool] | None) -> bool:
    """Whether a launch that just wrote its state is known to be over all the same: it was killed."""
    if job_id and job_is_live is not None:
        return not job_is_live(job_id)
    return host == socket.gethostname() and not Path(f"/proc/{pid}").exists()


def _try_lock(descriptor: int) -> bool | None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _refusal(folder: Path, who: str, job_id: str) -> str:
    stop = f"megascale stop {shlex.quote(str(folder))}" + (f" or scancel {job_id}" if job_id else "")
    return f"{folder}: this run is live: {who}. Stop it first ({stop}), or give this one another run.folder"


def _user_name(uid: int) -> str:
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(uid).pw_name
    return f"uid {uid}"
