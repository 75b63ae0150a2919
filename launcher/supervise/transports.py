"""How agents come onto nodes, and how a job goes back into its queue."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from launcher.submit.plan import LaunchPlan
from launcher.supervise.interfaces import address_of, address_towards
from megascale.errors import LaunchError
from megascale.observe.console import say

AGENT_MODULE = "launcher.supervise.agent"
FAILED_NODE = re.compile(r"Task launch for .* failed on node (\S+):")
"""What srun says of a node whose slurmd it can't reach or that refuses."""
ENDED_WITHIN_S = 600.0
"""Longest wait for SLURM to end the life of a job that it has requeued."""


class Transport(Protocol):
    """A way to start agents.

    Attributes:
        nodes: of the job, in their order.
        job_id: empty without a scheduler.
        can_requeue: whether there is a queue to go back to.
    """

    nodes: tuple[str, ...]
    job_id: str
    can_requeue: bool

    def listen(self) -> socket.socket:
        """A socket that agents can reach, bound to one address."""

    def start(self, nodes: Sequence[str], controller: str, token_file: Path, logs: Path) -> None:
        """Starts agents; they connect to the controller by themselves."""

    def failed_start(self) -> tuple[str, ...] | None:
        """The nodes that the last start failed at, as far as the scheduler names them; None if it didn't fail."""

    def job_state(self) -> str:
        """What the scheduler says of the job; empty where nobody says."""

    def requeue(self, without: Iterable[str]) -> None:
        """Puts the job back into the queue; returns when the scheduler ends this life of it."""

    def close(self) -> None:
        """Ends what it started."""


class LocalTransport:
    """Agents as processes of this machine, each for a virtual node."""

    def __init__(self, plan: LaunchPlan):
        self.nodes = tuple(f"local{number}" for number in range(plan.nodes + plan.spares))
        self.job_id, self.can_requeue = "", False
        self._plan, self._agents = plan, []

    def listen(self) -> socket.socket:
        """A port of the loopback interface."""
        return socket.create_server(("127.0.0.1", 0), backlog=128)

    def start(self, nodes: Sequence[str], controller: str, token_file: Path, logs: Path) -> None:
        """Starts a process for each node, in a session of its own, so that Ctrl-C reaches the controller alone."""
        for node in nodes:
            with (logs / f"agent_{node}.log").open("ab") as log:
                self._agents.append(subprocess.Popen(
                    [*agent_command(self._plan, controller, token_file), "--node", node],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                ))

    def failed_start(self) -> tuple[str, ...] | None:
        """A process of this machine starts, or raises at once."""
        return None

    def job_state(self) -> str:
        """Nobody says."""
        return ""

    def requeue(self, without: Iterable[str]) -> None:
        """There is no queue."""
        raise LaunchError("this machine has no queue to go back to")

    def close(self) -> None:
        """Waits for the agents, which end when their controller has let them go."""
        end_processes(self._agents)


class SlurmTransport:
    """Agents as tasks of a SLURM job, one a node.

    Args:
        environment: of the batch script.
    """

    def __init__(self, plan: LaunchPlan, environment: Mapping[str, str]):
        self.nodes = tuple(host_names(environment["SLURM_JOB_NODELIST"]))
        self.job_id = slurm_job(environment)
        self.can_requeue = plan.is_requeued and not plan.is_chained
        self._plan, self._steps = plan, []
        self._own = environment.get("SLURMD_NODENAME", socket.gethostname())
        self._cores = plan.cluster.cpus_per_node or environment.get("SLURM_CPUS_ON_NODE", "1")

    def listen(self) -> socket.socket:
        """A port of the interface that the other nodes of the job reach this one by."""
        others = [node for node in self.nodes if node != self._own]
        if self._plan.cluster.interface:
            address = address_of(self._plan.cluster.interface)
        else:
            address = address_towards(others[0]) if others else "127.0.0.1"
        return socket.create_server((address, 0), backlog=4096)

    def start(self, nodes: Sequence[str], controller: str, token_file: Path, logs: Path) -> None:
        """One srun for all these nodes. A node that fails later on ends neither the step nor the job."""
        container = self._plan.cluster.container
        pyxis = [
            f"--container-image={container.image}",
            f"--container-mounts={','.join((*container.mounts, self._plan.run_folder))}",
        ] if container and container.kind == "pyxis" else []
        command = [
            "srun", "--overlap", f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", "--ntasks-per-node=1",
            f"--nodelist={','.join(nodes)}", f"--cpus-per-task={self._cores}", "--cpu-bind=none", "--mpi=none",
            "--kill-on-bad-exit=0", "--no-kill", "--wait=0", "--quit-on-interrupt", *pyxis,
            f"--output={str(logs).replace('%', '%%')}/agent_%N.log", "--open-mode=append",
            *agent_command(self._plan, controller, token_file),
        ]
        self._log = logs / "srun.log"
        with self._log.open("ab") as log:
            self._log_start = log.tell()
            self._steps.append(subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            ))

    def failed_start(self) -> tuple[str, ...] | None:
        """The nodes named by an srun that has ended: one that can't be reached has it end all others' agents, too."""
        if not self._steps or self._steps[-1].poll() in (None, 0):
            return None
        said = self._log.read_bytes()[self._log_start:].decode(errors="replace")
        return tuple(dict.fromkeys(FAILED_NODE.findall(said)))

    def job_state(self) -> str:
        """SLURM's word, such as RUNNING, or CANCELLED after scancel; empty when it can't be asked."""
        try:
            return _field(scontrol("-o", "show", "job", self.job_id), "JobState")
        except LaunchError:
            return ""

    def requeue(self, without: Iterable[str]) -> None:
        """Requeues the job under its id, without some nodes, and waits for SLURM to end this life of it.

        SLURM takes nodes to leave out for waiting jobs only, and may end this life at any moment from the requeue on.
        So the job is never held, which could be for ever; and SIGTERM, which goes to all processes of the job, waits
        until both commands are through: a requeued job starts after the expiry of its credential, 2 minutes by
        default. Is the second one lost all the same, the pre-flight of the next life sends the job back once more.

        Raises:
            LaunchError: SLURM refused, or lets this life go on.
        """
        is_ended = threading.Event()
        signal.signal(signal.SIGTERM, lambda number, frame: is_ended.set())
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # scontrol inherits it
        try:
            scontrol("requeue", self.job_id)
            self._leave_out([node for node in without if node])
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        if not is_ended.wait(ENDED_WITHIN_S):
            raise LaunchError(f"job {self.job_id} was requeued, but SLURM didn't end this life of it")

    def _leave_out(self, nodes: list[str]) -> None:
        """Has the waiting job leave out these nodes too."""
        if not nodes:
            return
        try:
            before = _field(scontrol("-o", "show", "job", self.job_id), "ExcNodeList")
            known = host_names(before) if before not in ("", "(null)") else ()
            scontrol("update", f"jobid={self.job_id}", f"excnodelist={','.join(dict.fromkeys([*nodes, *known]))}")
        except LaunchError as error:
            say(f"warning: job {self.job_id} may come back onto {', '.join(nodes)}: {error}")

    def close(self) -> None:
        """Ends the steps."""
        end_processes(self._steps)


def agent_command(plan: LaunchPlan, controller: str, token_file: Path) -> list[str]:
    """The agent's program and arguments, in its container where there is one."""
    cluster = plan.cluster
    command = [
        cluster.python or sys.executable, "-m", AGENT_MODULE, "--controller", controller, "--token-file",
        str(token_file), "--silence", str(cluster.limits.node_s),
    ]
    if cluster.container and cluster.container.kind == "apptainer":
        binds = ",".join((*cluster.container.mounts, plan.run_folder))
        gpus = ["--nv"] if cluster.gpus_per_node else []
        return ["apptainer", "exec", *gpus, "--bind", binds, cluster.container.image, *command]
    return command


def host_names(expression: str) -> list[str]:
    """The nodes that a SLURM host list stands for; scontrol knows all its forms.

    Raises:
        LaunchError: it can't be told; guessing would make each node a run of its own.
    """
    return scontrol("show", "hostnames", expression).split()


def slurm_job(environment: Mapping[str, str]) -> str:
    """The id by which this job, and no other link of its array, is requeued."""
    if "SLURM_ARRAY_TASK_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]


def _field(shown: str, name: str) -> str:
    """One field of a line of `scontrol -o show`."""
    return next((word.partition("=")[2] for word in shown.split() if word.startswith(f"{name}=")), "")


def scontrol(*arguments: str) -> str:
    """Runs scontrol.

    Raises:
        LaunchError: it isn't there, or refused.
    """
    if shutil.which("scontrol") is None:
        raise LaunchError("scontrol isn't found in the job; the batch script must run outside of containers")
    for _ in range(5):
        done = subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout
        if "Unable to contact" not in done.stderr and "timed out" not in done.stderr:
            break
        say(f"warning: scontrol {arguments[0]}: {done.stderr.strip()}; trying again")
        time.sleep(5)
    raise LaunchError(f"scontrol {' '.join(arguments)}: {done.stderr.strip()}")


def end_processes(processes: Sequence[subprocess.Popen], patience_s: float = 5.0) -> None:
    """Waits for processes that should end by themselves; then ends them."""
    deadline_s = time.monotonic() + patience_s
    for process in processes:
        try:
            process.wait(max(0.1, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
