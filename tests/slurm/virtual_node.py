"""One virtual node: namespaces, its slurmd, and what can befall it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.slurm.settings import Layout

NODE_INIT = Path(__file__).with_name("node_init.py")
STEPD_WRAPPER = """\
#!/bin/sh
# proctrack/linuxproc finds a job's processes by their parents. As a "child subreaper" (36), slurmstepd becomes the
# parent of orphans, which would escape every signal otherwise. Real sites track processes by cgroup.
exec {python} -I -S -c 'import ctypes, os, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
os.execvp("slurmstepd", ["slurmstepd", *sys.argv[1:]])' "$@"
"""


def namespace_options(isolation: str) -> list[str]:
    """Options of unshare for a node; users other than root get them in a user namespace of their own."""
    as_user = [] if os.getuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]
    return [*as_user, "--pid", "--uts", "--ipc", "--mount", *(["--net"] if isolation == "net" else [])]


def can_isolate(isolation: str) -> bool:
    """Whether this process may make such namespaces (containers often forbid it).

    Cost: some 20 ms.
    """
    wanted = "hostname probe && mount -t proc proc /proc && mount -t tmpfs tmpfs /dev/shm"
    if isolation == "net":
        wanted += " && ip link add name bridge9 type bridge && ip link add name veth9 type veth"
        if os.getuid() != 0:
            return False
    probe = ["unshare", *namespace_options(isolation), "--fork", "--kill-child", "sh", "-c", wanted]
    return subprocess.run(probe, capture_output=True, check=False, env=daemon_environment()).returncode == 0


def daemon_environment() -> dict[str, str]:
    """Environment of daemons and commands: nothing of a SLURM job that these tests may run in."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))}
    return kept | {"PATH": f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"}


class VirtualNode:
    """A node with its own processes, host name, mounts and /dev/shm (isolation `none`: processes alone).

    Args:
        layout: the cluster.
        name: of the node.
        switch_pid: process in the namespace of the switch, with isolation `net`.
    """

    def __init__(self, layout: Layout, name: str, switch_pid: int | None = None) -> None:
        self.layout = layout
        self.name = name
        self.switch_pid = switch_pid
        self._process: subprocess.Popen | None = None

    @property
    def is_up(self) -> bool:
        """Whether its first process lives."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Brings the node up: new namespaces, and slurmd in them."""
        folder = self.layout.folder
        slurmd = ["slurmd", "-D", "-N", self.name, "-f", f"{folder}/etc/slurm.conf", "-d", f"{folder}/bin/slurmstepd"]
        if os.getuid() != 0 and self.layout.isolation != "none":
            # Capabilities were needed for the mounts alone; jobs are a plain user's.
            slurmd = ["setpriv", "--inh-caps=-all", "--ambient-caps=-all", *slurmd]
        init = [sys.executable, "-I", "-S", str(NODE_INIT), self.name, self.layout.isolation, f"{folder}/etc/hosts"]
        if self.layout.isolation != "none":
            init = ["unshare", *namespace_options(self.layout.isolation), "--fork", "--kill-child", *init]
        with (folder / "log" / f"{self.name}.out").open("a") as output:
            self._process = subprocess.Popen(
                [*init, *slurmd], stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, text=True,
                start_new_session=True, env=daemon_environment() | {"SLURM_CONF": f"{folder}/etc/slurm.conf"},
            )
        if self.layout.isolation == "net":
            self._connect()
        self.start_slurmd()

    def start_slurmd(self) -> None:
        """Starts slurmd, beside jobs that an earlier one may have left."""
        self._process.stdin.write("slurmd\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        """Power cut: everything on the node is killed at once. Nothing happens when it's down."""
        if self._process is None:
            return
        if self.layout.isolation == "none":
            self.pause()
            for pid in self.pids():
                _send(pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        if self.layout.isolation == "net":
            self._disconnect()

    def kill_slurmd(self) -> None:
        """Kills slurmd alone."""
        for pid in self.pids():
            if _program(pid).split("-")[0] == "slurmd":  # Debian's file is slurmd-wlm
                _send(pid, signal.SIGKILL)

    def pause(self) -> None:
        """Stops every process (SIGSTOP), as if the node hung; connections stay open."""
        while running := [pid for pid in self.pids() if _state(pid) not in "TtZX"]:
            for pid in running:
                _send(pid, signal.SIGSTOP)
            time.sleep(0.01)  # one that was being forked meanwhile is stopped next

    def resume(self) -> None:
        """Undoes `pause`."""
        for pid in self.pids():
            _send(pid, signal.SIGCONT)

    def set_link(self, is_up: bool) -> None:
        """Cuts or mends the node's cable; only with isolation `net`."""
        _ip(self.switch_pid, "link", "set", "dev", self.name, "up" if is_up else "down")

    def pids(self) -> list[int]:
        """Processes of the node besides its first, as numbered here."""
        parents = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and (fields := _stat(int(entry.name))):
                parents.setdefault(int(fields[1]), []).append(int(entry.name))
        found, queue = [], [self.first_pid] if self.is_up else []
        while queue:
            children = parents.get(queue.pop(), [])
            found += children
            queue += children
        return found

    @property
    def first_pid(self) -> int:
        """The node's first process, as numbered here."""
        if self.layout.isolation == "none":
            return self._process.pid
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        while self.is_up:
            if first := children.read_text().split():
                return int(first[0])
            time.sleep(0.005)
        raise RuntimeError(f"{self.name} is down; see {self.layout.folder}/log/{self.name}.out")

    def enter(self) -> list[str]:
        """Words to put before a command so that it runs inside the node."""
        if self.layout.isolation == "none":
            raise RuntimeError(f"{self.name} has no namespaces to enter: isolation is none")
        as_user = [] if os.getuid() == 0 else ["--user", "--preserve-credentials"]
        spaces = ["--pid", "--uts", "--ipc", "--mount", *(["--net"] if self.layout.isolation == "net" else [])]
        return ["nsenter", "--target", str(self.first_pid), *as_user, *spaces]

    def _connect(self) -> None:
        # A card outlives its node's restarts: with another address others would send to the old one for seconds.
        pid, card = self.first_pid, f"02:00:00:00:00:{self.layout.number(self.name):02x}"
        cable = ["name", self.name, "type", "veth", "peer", "name", "eth0", "address", card, "netns", str(pid)]
        _ip(self.switch_pid, "link", "add", *cable)
        _ip(self.switch_pid, "link", "set", "dev", self.name, "up", "master", "bridge0")
        _ip(pid, "link", "set", "dev", "lo", "up")
        _ip(pid, "addr", "add", f"{self.layout.address(self.name)}/24", "dev", "eth0")
        _ip(pid, "link", "set", "dev", "eth0", "up")


    def _disconnect(self) -> None:
        """Takes the cable away: the kernel does so too, but some time after the node's end."""
        command = ["nsenter", "--target", str(self.switch_pid), "--net", "ip", "link", "del", "dev", self.name]
        subprocess.run(command, capture_output=True, check=False, env=daemon_environment())


def _ip(pid: int, *words: str) -> None:
    """Runs `ip` in the network namespace of a process."""
    subprocess.run(["nsenter", "--target", str(pid), "--net", "ip", *words], check=True, env=daemon_environment())


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on: state, parent, ...; empty when it's gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _state(pid: int) -> str:
    return (_stat(pid) or ["X"])[0]


def _program(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/exe").readlink().name
    except OSError:
        return ""
