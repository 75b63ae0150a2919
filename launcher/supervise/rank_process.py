"""One rank as its agent holds it: started, pinned to cores, looked at from outside, ended."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

from megascale.parallel.heartbeat import Beat, read_beat
from megascale.parallel.supervision import DUMP_BYTE, DUMP_SIGNAL, WATCH_VARIABLE
from megascale.train.signals import stop_when_parent_dies

TAIL_BYTES = 16 << 10
CGROUPS = Path("/sys/fs/cgroup")


class RankProcess:
    """A rank's process with its log, its heartbeat and the pipe that asks it for a dump.

    Args:
        command: program and arguments.
        environment: of the process, complete.
        folder: of the attempt; the log goes there.
        heartbeat: path of its heartbeat file.
        cores: it may run on; empty for all.
        inherited: descriptors that it gets besides.
    """

    def __init__(
        self, rank: int, command: Sequence[str], environment: Mapping[str, str], folder: Path, heartbeat: Path,
        cores: Sequence[int], inherited: Sequence[int] = (),
    ):
        self.rank, self.heartbeat = rank, heartbeat
        self.log = folder / f"rank_{rank:05d}.log"
        self.has_reported = False
        self._cgroup, self._oom_before = None, 0
        self._beat: Beat | None = None
        watch_end, self._watch = os.pipe()

        def prepare() -> None:
            stop_when_parent_dies()
            signal.signal(DUMP_SIGNAL, signal.SIG_IGN)  # until the rank dumps its stacks at it
            if cores:
                os.sched_setaffinity(0, cores)

        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env={**environment, WATCH_VARIABLE: str(watch_end)}, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True, preexec_fn=prepare, pass_fds=(watch_end, *inherited),
            )
        os.close(watch_end)
        self.look()

    @property
    def code(self) -> int | None:
        """Exit code, None while it runs."""
        return self.process.poll()

    def look(self) -> list:
        """Its last heartbeat, as a list, and the state letter of its process; `[rank]` before the first."""
        self._note_cgroup()
        beat = self._last_beat()
        return [self.rank, *(astuple(beat) if beat else ()), self._state()]

    def signal(self, number: int) -> None:
        """Sends a signal, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def ask_for_dump(self) -> None:
        """Asks for stacks and collectives: by the pipe, and by a signal that works without the interpreter."""
        with contextlib.suppress(OSError):
            os.write(self._watch, DUMP_BYTE)
        self.signal(DUMP_SIGNAL)

    def kill(self) -> None:
        """Ends it and all that it started; a stopped process as well."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def describe_end(self) -> dict:
        """How it ended, once it has."""
        with contextlib.suppress(OSError):
            os.close(self._watch)
        text = self._tail()
        _, marker, message = ("\n" + text).rpartition("\nerror: ")
        beat = self._last_beat()
        return {
            "rank": self.rank, "code": self.process.returncode, "error": message.strip() if marker else None,
            "tail": text[-4000:], "unix_s": time.time(), "step": beat.step if beat else -1,
            "phase": str(beat.phase) if beat else "start", "log": str(self.log), "oom": self._oom(),
        }

    def _last_beat(self) -> Beat | None:
        self._beat = read_beat(self.heartbeat) or self._beat
        return self._beat

    def _tail(self) -> str:
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - TAIL_BYTES))
                return file.read().decode(errors="replace")
        except OSError:
            return ""

    def _state(self) -> str:
        try:
            return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return "X"

    def _note_cgroup(self) -> None:
        """Where its memory is limited, as that shows only while it lives."""
        found = memory_cgroup(self.process.pid)
        is_exiting = self._cgroup is not None and found == CGROUPS / "memory"  # the kernel shows the root from then on
        if found is not None and found != self._cgroup and not is_exiting:
            self._cgroup, self._oom_before = found, oom_kills(found)

    def _oom(self) -> dict | None:
        """Limit and peak of its memory, when the kernel killed something in its cgroup since it started."""
        if self._cgroup is None or self.process.returncode != -signal.SIGKILL:
            return None
        if oom_kills(self._cgroup) <= self._oom_before:
            return None
        limit = _number(self._cgroup, "memory.max", "memory.limit_in_bytes")
        return {"limit_bytes": limit, "peak_bytes": _number(self._cgroup, "memory.peak", "memory.max_usage_in_bytes")}


def memory_cgroup(pid: int) -> Path | None:
    """The folder that limits a process's memory, of either version of cgroups."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            folder = CGROUPS / ("memory" if controllers else "") / path.lstrip("/")
            if folder.is_dir():
                return folder
    return None


def oom_kills(cgroup: Path) -> int:
    """How often the kernel has killed in a cgroup for want of memory."""
    for name in ("memory.events", "memory.oom_control"):
        with contextlib.suppress(OSError, ValueError):
            values = dict(line.split() for line in (cgroup / name).read_text().splitlines())
            return int(values.get("oom_kill", 0))
    return 0


def _number(cgroup: Path, *names: str) -> int | None:
    for name in names:
        with contextlib.suppress(OSError, ValueError):
            return int((cgroup / name).read_text())
    return None
