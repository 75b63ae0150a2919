"""A real SLURM of virtual nodes on this machine, for tests: munged, slurmctld and a slurmd for each node.

Needs the Debian packages slurm-wlm and munge, no systemd, no accounts, no configuration; nothing outside a temporary
folder changes. The daemons die with the process that started them, also if that is killed.
"""

import os
import pwd
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from shlex import quote

from tests.slurm.settings import Layout, gres_file, hosts_file, slurm_file
from tests.slurm.virtual_node import STEPD_WRAPPER, VirtualNode, can_isolate, daemon_environment

PROGRAMS = ("munged", "munge", "slurmctld", "slurmd", "slurmstepd", "sbatch", "srun", "scontrol", "sinfo", "unshare",
            "nsenter", "setpriv")
FOLDER_MAX_CHARACTERS = 60
FIELD = re.compile(r"(\S+?)=(.*?)(?=\s\S+?=|\s*$)")


def missing_programs() -> list[str]:
    """Programs that a cluster needs and that this machine lacks."""
    path = daemon_environment()["PATH"]
    return [program for program in PROGRAMS if shutil.which(program, path=path) is None]


def parse_record(line: str) -> dict[str, str]:
    """Fields of a line of `scontrol -o show`; a value may hold spaces, but no ` word=`."""
    return dict(FIELD.findall(line.strip()))


class SlurmCluster:
    """A cluster of virtual nodes node1, node2, ...; `with SlurmCluster(nodes=3) as cluster:` starts and stops it.

    Jobs run as this user. Partition `debug` is the default; a job in `high` preempts its jobs (requeue, 10 s to save).

    Args:
        isolation: `pid`: nodes have their own processes, host name, /dev/shm and 127.x address; `net`: besides, their
            own network, for `cut_node` (root and iproute2 only); `none`: nothing of these, and their names don't
            resolve; None takes `pid` where the kernel lets us, else `none`.
        port: of the controller, nodes take those above; None finds free ones.
    """

    def __init__(
        self, nodes: int = 3, cpus: int = 4, gpus: int = 0, memory_mib: int = 8000, isolation: str | None = None,
        port: int | None = None,
    ) -> None:
        isolation = isolation or ("pid" if can_isolate("pid") else "none")
        if isolation != "none" and not can_isolate(isolation):
            raise RuntimeError(f"isolation {isolation}: this user can't make such namespaces here")
        folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        if len(str(folder)) > FOLDER_MAX_CHARACTERS:
            raise RuntimeError(f"{folder}: too long for unix sockets; set TMPDIR to a shorter folder")
        self.layout = Layout(folder, nodes, cpus, gpus, memory_mib, port or _free_ports(nodes + 1), isolation,
                             pwd.getpwuid(os.getuid()).pw_name)
        self.nodes: dict[str, VirtualNode] = {}
        self.env = daemon_environment() | {"SLURM_CONF": f"{folder}/etc/slurm.conf"}
        self._touched: set[str] = set()
        self._daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "SlurmCluster":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def start(self) -> None:
        """Starts all daemons and waits until every node is idle.

        Cost: about a second.
        """
        self._write_files()
        folder = self.layout.folder
        self._start_daemon("munged", "--foreground", f"--key-file={folder}/etc/munge.key",
                           f"--socket={folder}/run/munge.socket", f"--pid-file={folder}/run/munged.pid",
                           f"--log-file={folder}/log/munged.log", f"--seed-file={folder}/run/munge.seed")
        socket_file = folder / "run" / "munge.socket"
        self._await("munged answers", lambda: self.run("munge", "-S", str(socket_file), "-n", check=False) is not None)
        switch = self._start_switch() if self.layout.isolation == "net" else None
        self.nodes = {name: VirtualNode(self.layout, name, switch) for name in self.layout.node_names}
        self._start_controller("-c")
        for node in self.nodes.values():
            node.start()
        self._await("all nodes are idle", lambda: self._idle_nodes() == set(self.nodes), timeout_s=60)

    def stop(self) -> None:
        """Ends everything that this object started, and removes its folder. May be called twice."""
        for node in self.nodes.values():
            node.kill()
        for daemon in reversed(self._daemons.values()):
            daemon.kill()
            daemon.wait()
        shutil.rmtree(self.layout.folder, ignore_errors=True)

    # Commands

    def run(self, *words: str | Path, check: bool = True, timeout_s: float = 60, **options) -> str | None:
        """Runs a command with SLURM_CONF set; returns what it printed, or None when it failed and `check` is False."""
        done = subprocess.run(
            [str(word) for word in words], env=self.env, capture_output=True, text=True, timeout=timeout_s, check=False,
            **options,
        )
        if done.returncode and check:
            raise RuntimeError(f"{words}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return None if done.returncode else done.stdout

    def sbatch(self, *arguments: str | Path) -> int:
        """`sbatch ARGUMENTS`; returns the job's id."""
        return int(self.run("sbatch", "--parsable", *arguments).strip())

    def submit(self, script: str, *options: str) -> int:
        """Submits the lines of a bash script, with options of sbatch; returns the job's id."""
        return int(self.run("sbatch", "--parsable", *options, input=f"#!/bin/bash\n{script}\n").strip())

    def scontrol(self, *arguments: str) -> str:
        """`scontrol ARGUMENTS`."""
        return self.run("scontrol", *arguments)

    def squeue(self, *arguments: str) -> list[str]:
        """Lines of `squeue -h ARGUMENTS`."""
        return self.run("squeue", "-h", *arguments).splitlines()

    def sinfo(self, *arguments: str) -> list[str]:
        """Lines of `sinfo -h ARGUMENTS`."""
        return self.run("sinfo", "-h", *arguments).splitlines()

    def job(self, job_id: int | str) -> dict[str, str]:
        """Fields of a job, such as JobState, Restarts, NodeList, ExitCode; of an array, of its first record."""
        return parse_record(self.scontrol("-o", "show", "job", str(job_id)).splitlines()[0])

    def node(self, name: str) -> dict[str, str]:
        """Fields of a node, such as State and Reason."""
        return parse_record(self.scontrol("-o", "show", "node", name))

    def wait_for(self, job_id: int | str, *states: str, restarts: int = 0, timeout_s: float = 60) -> dict[str, str]:
        """Waits until a job is in one of the states, having been requeued so many times; returns its fields.

        Raises:
            TimeoutError: it took longer; with the job's fields and the end of the controller's log.
        """
        seen: dict[str, str] = {}

        def is_there() -> bool:
            seen.update(self.job(job_id))
            return seen["JobState"] in states and int(seen["Restarts"]) >= restarts

        self._await(f"job {job_id} is {' or '.join(states)} after {restarts} restarts", is_there, timeout_s, seen)
        return seen

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
        """Waits until a condition holds; `what` says in words which."""
        self._await(what, condition, timeout_s)

    # Faults

    def kill_node(self, name: str) -> None:
        """Power cut: slurmd and all jobs' processes of a node die at once."""
        self._touch(name).kill()

    def kill_slurmd(self, name: str) -> None:
        """Slurmd alone dies; its jobs run on."""
        self._touch(name).kill_slurmd()

    def pause_node(self, name: str) -> None:
        """Every process of a node stops (SIGSTOP)."""
        self._touch(name).pause()

    def resume_node(self, name: str) -> None:
        """Undoes `pause_node`."""
        self.nodes[name].resume()

    def cut_node(self, name: str) -> None:
        """A node loses its network; isolation `net` only."""
        self._touch(name).set_link(False)

    def mend_node(self, name: str) -> None:
        """Undoes `cut_node`."""
        self.nodes[name].set_link(True)

    def doctor(self, name: str, *words: str) -> str:
        """Runs a command inside a node, such as a mount; `heal_node` undoes what it did to the node.

        Raises:
            RuntimeError: it failed, or nodes are not isolated.
        """
        return self.run(*self._touch(name).enter(), *words)

    def node_pids(self, name: str) -> list[int]:
        """Processes on a node, as numbered here."""
        return self.nodes[name].pids()

    def restart_slurmd(self, name: str) -> None:
        """Starts slurmd on a node where it died alone; jobs that run there are found again."""
        self.nodes[name].start_slurmd()

    def heal_node(self, name: str) -> None:
        """Switches a node off and on, and into service again: jobs still on it are requeued."""
        node = self.nodes[name]
        started = self.node(name).get("SlurmdStartTime")
        node.kill()
        # A real node that rebooted unnoticed gives itself away by its boot time, which is this machine's here.
        self.scontrol("update", f"nodename={name}", "state=down", "reason=switched off")
        # Start times tell one slurmd from the next, in whole seconds.
        self._await("a new second began", lambda: time.strftime("%Y-%m-%dT%H:%M:%S") != started)
        node.start()
        self._await(f"{name} registers", lambda: self.node(name).get("SlurmdStartTime") != started)
        self.scontrol("update", f"nodename={name}", "state=resume")
        self._touched.discard(name)

    def restart_controller(self) -> None:
        """Ends slurmctld and starts it again, as an upgrade does; killed, it would lose what it heard last."""
        daemon = self._daemons.pop("slurmctld")
        daemon.terminate()
        daemon.wait(timeout=20)
        self._start_controller()

    def heal(self) -> None:
        """Ends all jobs and mends all nodes: what a test leaves to the next one."""
        jobs = self.squeue("-o", "%A")
        if jobs:
            self.run("scancel", "--full", "--signal=KILL", *jobs, check=False)
            self.run("scancel", *jobs, check=False)
        for name in sorted(self._touched | {name for name in self.nodes if "DOWN" in self.node(name)["State"]}):
            self.heal_node(name)
        for name in self.nodes:
            if "DRAIN" in self.node(name)["State"]:
                self.scontrol("update", f"nodename={name}", "state=resume")
        self._await("no job is left and all nodes are idle", lambda: not self.squeue("-o", "%A", "-t",
                    "PD,R,CG,S") and self._idle_nodes() == set(self.nodes))

    # Parts

    def _touch(self, name: str) -> VirtualNode:
        self._touched.add(name)
        return self.nodes[name]

    def _idle_nodes(self) -> set[str]:
        return set((self.run("sinfo", "-h", "-N", "-p", "debug", "-t", "idle", "-o", "%N", check=False) or "").split())

    def _write_files(self) -> None:
        folder = self.layout.folder
        folder.chmod(0o755)  # munged refuses a socket that not everybody can reach; its key is private
        for name in ("etc", "run", "log", "spool/controller", "bin", "dev"):
            (folder / name).mkdir(parents=True, mode=0o755)
        (folder / "etc/munge.key").touch(0o600)
        (folder / "etc/munge.key").write_bytes(os.urandom(128))
        (folder / "etc/hosts").write_text(hosts_file(self.layout))
        (folder / "etc/slurm.conf").write_text(slurm_file(self.layout))
        if self.layout.gpus:
            (folder / "etc/gres.conf").write_text(gres_file(self.layout))
        for gpu in range(self.layout.gpus):
            (folder / f"dev/gpu{gpu}").symlink_to("/dev/null")
        wrapper = folder / "bin/slurmstepd"
        wrapper.write_text(STEPD_WRAPPER.format(python=quote(sys.executable)))
        wrapper.chmod(0o755)

    def _start_daemon(self, name: str, *arguments: str) -> subprocess.Popen:
        with (self.layout.folder / "log" / f"{name}.out").open("a") as output:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", name, *arguments], stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True, env=self.env,
            )
        return self._daemons[name]

    def _start_controller(self, *arguments: str) -> None:
        self._start_daemon("slurmctld", "-D", *arguments, "-f", self.env["SLURM_CONF"])
        self._await("slurmctld answers", lambda: self.run("scontrol", "ping", check=False) is not None)

    def _start_switch(self) -> int:
        """A bridge in a network namespace of its own, where no firewall rule of this machine applies, and one cable."""
        switch = self._start_daemon("unshare", "--net", "sleep", "infinity")
        inside = ["nsenter", "--target", str(switch.pid), "--net"]
        here = Path("/proc/self/ns/net").readlink()
        self._await("the switch is up", lambda: Path(f"/proc/{switch.pid}/ns/net").readlink() != here)
        cable = f"slurm{self.layout.port}"
        self.run("ip", "link", "add", "name", cable, "type", "veth", "peer", "name", "uplink", "netns", str(switch.pid))
        self.run("ip", "addr", "add", f"{self.layout.controller_address}/24", "dev", cable)
        self.run("ip", "link", "set", "dev", cable, "up")
        for words in ("add name bridge0 type bridge", "set dev bridge0 up", "set dev uplink up master bridge0"):
            self.run(*inside, "ip", "link", *words.split())
        return switch.pid

    def _await(
        self, what: str, condition: Callable[[], bool], timeout_s: float = 60, seen: dict[str, str] | None = None
    ) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            dead = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if dead or time.monotonic() > deadline:
                logs = sorted((self.layout.folder / "log").iterdir())
                ends = "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs)
                raise TimeoutError(f"not within {timeout_s} s: {what}\ndead: {dead}\n{seen or ''}\n{ends}")
            time.sleep(0.05)


def _free_ports(count: int) -> int:
    """First of `count` neighbouring ports that nobody listens on, below those that the kernel deals out."""
    while True:
        first = random.SystemRandom().randrange(20_000, 30_000)
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("", port))
        except OSError:
            continue
        return first
