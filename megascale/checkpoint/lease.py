"""One job at a time on a run folder: a lock that dies with its process, and a heartbeat where locks don't reach.

The lock is an flock on `lease.json`, which the kernel releases at any death. Machines that share a file system without
sharing its locks are told apart by their boot id, and a holder on another machine counts as dead when its heartbeat
(the file's modification time) stands still for `STALE_S` under one's own eyes: no clocks are compared.
"""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from megascale.checkpoint.files import read_bounded
from megascale.checkpoint.records import parse_record, to_json
from megascale.errors import CheckpointError, LeaseLostError

LEASE_NAME = "lease.json"
HEARTBEAT_S = 10.0
STALE_S = 60.0
"""Six missed heartbeats; also the longest that NFS caches a modification time by default."""
MAX_OWNER_BYTES = 4096
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Owner:
    """Who holds a run folder.

    Attributes:
        host: name of the machine, for people.
        boot_id: identity of the machine since it was started, for the program.
        pid: process on that machine.
        started: when the lease was taken, local time, for people.
        token: random, so that a holder sees when it was replaced.
        life: of the launcher that started the holder; empty where none did.
    """

    host: str
    boot_id: str
    pid: int
    started: str
    token: str
    life: str = ""


@dataclass(frozen=True)
class LeaseClaim:
    """What a holder can show, and another process on its behalf."""

    path: str
    owner: Owner


def check_claim(claim: LeaseClaim) -> None:
    """Makes sure that no other job has taken the run folder, for instance while the holder was frozen.

    Raises:
        LeaseLostError: another job has.
    """
    holder = _read_owner(Path(claim.path))
    if holder != claim.owner:
        raise LeaseLostError(_refusal(Path(claim.path), holder))


class RunLease:
    """Holds a run folder from `take` until `release` or the death of the process."""

    def __init__(self, path: Path, descriptor: int, owner: Owner, heartbeat_s: float):
        self._path, self._descriptor, self._owner, self._heartbeat_s = path, descriptor, owner, heartbeat_s
        self._released = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="lease-heartbeat", daemon=True)
        self._heart.start()

    @classmethod
    def take(
        cls, run_folder: Path, *, life: str = "", heartbeat_s: float = HEARTBEAT_S, stale_s: float = STALE_S
    ) -> Self:
        """Takes the run folder, at once unless its last holder was on another machine and didn't release it.

        Args:
            life: names a launcher that lets one attempt of the run begin only when the one before it is gone, so a
                holder of the same life is dead, wherever it was; empty where nobody promises that.

        Raises:
            CheckpointError: another job holds it, or the folder isn't writable.
        """
        path = Path(run_folder) / LEASE_NAME
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise CheckpointError(f"{path}: can't take the run folder: {error.strerror}") from None
        try:
            is_locked = _lock(descriptor)
            holder = _read_owner(path)
            if is_locked is False or (holder and _may_live(holder, is_locked, life) and _is_beating(path, stale_s)):
                raise CheckpointError(_refusal(path, holder))
            owner = _describe_self(life)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, to_json(asdict(owner)), 0)
            os.fsync(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor, owner, heartbeat_s)

    @property
    def claim(self) -> LeaseClaim:
        """What shows that this job holds the run folder."""
        return LeaseClaim(str(self._path), self._owner)

    def release(self) -> None:
        """Gives the run folder back; safe to call more than once."""
        if self._released.is_set():
            return
        self._released.set()
        self._heart.join()
        if _read_owner(self._path) == self._owner:
            os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._released.wait(self._heartbeat_s):
            if _read_owner(self._path) not in (self._owner, None):
                return
            with contextlib.suppress(OSError):  # a file system that is away for a while must not end the heartbeat
                os.utime(self._descriptor)


def _lock(descriptor: int) -> bool | None:
    """True when the lock is ours, False when another process has it, None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _may_live(holder: Owner, is_locked: bool | None, life: str) -> bool:
    """Whether a holder whose lock we don't see may still be at work; on this machine its lock would tell."""
    if life and holder.life == life:
        return False
    return holder.boot_id != _boot_id() or is_locked is None


def _is_beating(path: Path, stale_s: float) -> bool:
    """Watches for a heartbeat, for at most `stale_s`. Opens the file anew each time, which makes NFS look afresh."""
    first = _modified(path)
    deadline = time.monotonic() + stale_s
    while time.monotonic() < deadline:
        time.sleep(min(1.0, stale_s / 20))
        if _modified(path) != first:
            return True
    return False


def _modified(path: Path) -> int:
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns


def _read_owner(path: Path) -> Owner | None:
    try:
        values = json.loads(read_bounded(path, MAX_OWNER_BYTES) or b"")
        # A lease of before there were lives is one without: its holder may be at work.
        return parse_record(Owner, to_json({"life": ""} | values), path) if isinstance(values, dict) else None
    except (CheckpointError, OSError, ValueError, RecursionError):
        return None


def _describe_self(life: str) -> Owner:
    return Owner(
        host=socket.gethostname(), boot_id=_boot_id(), pid=os.getpid(),
        started=time.strftime("%Y-%m-%d %H:%M:%S %z"), token=secrets.token_hex(8), life=life,
    )


def _boot_id() -> str:
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else socket.gethostname()


def _refusal(path: Path, holder: Owner | None) -> str:
    who = f"process {holder.pid} on {holder.host}, since {holder.started}" if holder else "another process"
    return f"{path.parent}: is in use by {who}; stop that job first, or give this one another run.folder"
