"""What SLURM says about itself: partitions, their nodes, jobs. Questions are processes; answers are parsed purely."""

import difflib
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.submit.time_limit import parse_time_limit
from megascale.config.cluster import ClusterConfig
from megascale.errors import LaunchError

ASK_S = 60
"""A busy controller may take so long to answer; longer is an error of its own."""
SINFO = ("sinfo", "--noheader", "--format=%P|%a|%l|%D|%G")
GONE_WORDS = ("Invalid job id",)
ENDED_STATES = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY",
                "PREEMPTED", "REVOKED"}


@dataclass(frozen=True)
class NodeGroup:
    """Nodes of a partition that are alike.

    Attributes:
        partition: name.
        is_default: whether it is the partition of jobs that name none.
        is_up: whether it takes jobs.
        limit: longest time of a job, in SLURM's form.
        num_nodes: nodes in the group.
        gpus: GPUs of each by type, "" for one without a type.
    """

    partition: str
    is_default: bool
    is_up: bool
    limit: str
    num_nodes: int
    gpus: dict[str, int]

    def num_gpus(self, kind: str | None) -> int:
        """GPUs of a node, of one type or of any."""
        return sum(count for name, count in self.gpus.items() if kind in (None, name))


class SchedulerAwayError(LaunchError):
    """The scheduler doesn't answer, so nothing can be said about its nodes and jobs."""


def find_sbatch() -> str | None:
    """Path of sbatch, None where there is none."""
    return shutil.which("sbatch")


def ask(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command of the scheduler to its end, and returns its output as text.

    Raises:
        SchedulerAwayError: it can't be started, or doesn't answer.
    """
    try:
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=ASK_S, check=False,
            stdin=subprocess.DEVNULL,
        )
    except OSError as error:
        problem = f"{command[0]} can't be run: {error.strerror}; is this a login node of a SLURM cluster?"
    except subprocess.TimeoutExpired:
        problem = f"{command[0]} gave no answer in {ASK_S} s: the scheduler is away or overloaded; try again"
    raise SchedulerAwayError(problem)


def ask_nodes() -> list[NodeGroup]:
    """All groups of nodes that the user may see.

    Raises:
        SchedulerAwayError: the scheduler doesn't say.
    """
    answer = ask(SINFO)
    if answer.returncode:
        raise SchedulerAwayError(
            f"sinfo failed, so the scheduler can't be asked for its partitions: {answer.stderr.strip()}")
    return parse_sinfo(answer.stdout)


def parse_sinfo(text: str) -> list[NodeGroup]:
    """Reads what SINFO prints."""
    groups = []
    for line in text.splitlines():
        name, state, limit, count, gres = line.strip().split("|")
        is_default = name.endswith("*")
        groups.append(NodeGroup(name.rstrip("*"), is_default, state == "up", limit, int(count), parse_gpus(gres)))
    return groups


def parse_gpus(gres: str) -> dict[str, int]:
    """GPUs of a node by type, from its generic resources such as `gpu:h100:8(S:0-1),nvme:1`."""
    gpus: dict[str, int] = {}
    for part in gres.replace("(null)", "").split(","):
        words = part.split("(")[0].split(":")
        if words[0] == "gpu" and words[-1].isdigit():
            kind = words[1] if len(words) == 3 else ""
            gpus[kind] = gpus.get(kind, 0) + int(words[-1])
    return gpus


def check_nodes(groups: Sequence[NodeGroup], cluster: ClusterConfig, num_nodes: int, time: str | None) -> str:
    """Makes sure that a partition could run the job when it is empty.

    Args:
        num_nodes: nodes to ask for, spares included.

    Returns:
        The partition that the job goes to.

    Raises:
        LaunchError: there is no such partition, it is down, its nodes have fewer GPUs, there are fewer nodes, or its
            time limit is shorter.
    """
    partition = choose_partition(groups, cluster.partition)
    own = [group for group in groups if group.partition == partition]
    if not any(group.is_up for group in own):
        raise LaunchError(f"partition {partition} is down, so no job starts in it; up are: "
                          f"{', '.join(sorted({group.partition for group in groups if group.is_up})) or 'none'}")
    fitting = own
    if cluster.gpu_request != "none" and cluster.gpus_per_node:
        kind = cluster.gpu_type
        fitting = [group for group in own if group.num_gpus(kind) >= cluster.gpus_per_node]
        if not fitting:
            most = max(group.num_gpus(kind) for group in own)
            raise LaunchError(
                f"asked for {cluster.gpus_per_node} GPUs{f' of type {kind}' if kind else ''} on a node, and nodes of"
                f" partition {partition} have {most or 'none'} ({_describe_gpus(own)}); use --gpus-per-node {most}, or"
                " another partition"
            )
    present = sum(group.num_nodes for group in fitting)
    if present < num_nodes:
        raise LaunchError(f"asked for {num_nodes} nodes, spares included, and partition {partition} has {present} that"
                          f" fit; use {present} at most, or another partition")
    _check_partition_limit(own[0], time)
    return partition


def choose_partition(groups: Sequence[NodeGroup], asked: str | None) -> str:
    """The partition asked for, or the default one.

    Raises:
        LaunchError: there is none.
    """
    names = list(dict.fromkeys(group.partition for group in groups))
    if asked is None:
        default = next((group.partition for group in groups if group.is_default), None)
        if default is None:
            raise LaunchError(f"the cluster has no default partition; give --partition, one of: {', '.join(names)}")
        return default
    unknown = [name for name in asked.split(",") if name not in names]
    if unknown:
        close = difflib.get_close_matches(unknown[0], names, n=1, cutoff=0.4)
        raise LaunchError(f"partition {unknown[0]!r}: no such partition"
                          + (f"; did you mean {close[0]!r}?" if close else ";")
                          + f" there are: {', '.join(names) or 'none'}")
    return asked.split(",")[0]


def job_is_live(job_id: str) -> bool:
    """Whether a job waits or runs.

    Raises:
        SchedulerAwayError: the scheduler doesn't say.
    """
    answer = ask(["squeue", "--noheader", f"--jobs={job_id}", "--states=all", "--format=%T"])
    if answer.returncode:
        if any(words in answer.stderr for words in GONE_WORDS):
            return False
        raise SchedulerAwayError(f"squeue failed, so it can't be told whether job {job_id} of this run is over:"
                                 f" {answer.stderr.strip()}")
    return bool(set(answer.stdout.split()) - ENDED_STATES)


def _check_partition_limit(group: NodeGroup, time: str | None) -> None:
    if time is None or not group.limit[:1].isdigit():  # "infinite", "n/a"
        return
    if parse_time_limit(time) > parse_time_limit(group.limit):
        raise LaunchError(f"--time {time} is longer than the limit of partition {group.partition}, {group.limit}; give"
                          " that or less, and --array-restarts K for K such jobs in a row")


def _describe_gpus(groups: Sequence[NodeGroup]) -> str:
    kinds = {f"{count} {kind or 'gpu'}" for group in groups for kind, count in group.gpus.items()}
    return ", ".join(sorted(kinds)) or "no GPUs"
