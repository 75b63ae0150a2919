"""What a virtual SLURM cluster looks like, and the files that its daemons read: text made from values, no effects."""

from dataclasses import dataclass
from pathlib import Path

FIRST_HOST = 10
"""Node i has the host number FIRST_HOST + i in the cluster's own network."""


FIXED_SETTINGS = """\
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
PropagateResourceLimits=NONE
MailProg=/bin/true
# Real sites have SlurmdTimeout=300, KillWait=30, MinJobAge=300.
SlurmdTimeout=10
SlurmctldTimeout=10
KillWait=15
MinJobAge=3600
UnkillableStepTimeout=20
BatchStartTimeout=10
MessageTimeout=5
TCPTimeout=2
ReturnToService=1
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=100000
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
"""
"""No cgroups, no database, quick reactions."""


@dataclass(frozen=True)
class Layout:
    """One virtual cluster.

    Attributes:
        folder: of all its files; short, since unix sockets lie in it and a path of theirs has 107 characters at most.
        nodes: how many, named node1, node2, ...
        cpus, gpus, memory_mib: what each claims to have; the GPUs are not real.
        port: of the controller; node i listens on port + i.
        isolation: `pid`, `net` or `none`, see `SlurmCluster`.
        user: that daemons and jobs run as.
    """

    folder: Path
    nodes: int
    cpus: int
    gpus: int
    memory_mib: int
    port: int
    isolation: str
    user: str

    @property
    def node_names(self) -> list[str]:
        """Names of all nodes, in order."""
        return [f"node{number}" for number in range(1, self.nodes + 1)]

    @property
    def subnet(self) -> str:
        """First three numbers of the cluster's addresses, which no other cluster on this machine has."""
        high, low = divmod(self.port, 256)
        return f"10.213.{self.port % 250}" if self.isolation == "net" else f"127.{high}.{low}"

    @property
    def controller_address(self) -> str:
        """Where the controller listens."""
        return f"{self.subnet}.1" if self.isolation == "net" else "127.0.0.1"

    def address(self, node: str) -> str:
        """A node's address."""
        if self.isolation == "none":
            return "127.0.0.1"
        return f"{self.subnet}.{FIRST_HOST + self.number(node)}"

    def number(self, node: str) -> int:
        """A node's number, from 1."""
        return self.node_names.index(node) + 1


def hosts_file(layout: Layout) -> str:
    """`/etc/hosts` of every node."""
    nodes = [f"{layout.address(node)} {node}" for node in layout.node_names]
    return "\n".join(["127.0.0.1 localhost", "::1 localhost", *nodes]) + "\n"


def gres_file(layout: Layout) -> str:
    """`gres.conf`: SLURM wants a character device for each GPU; links to /dev/null will do."""
    gpus = "0" if layout.gpus == 1 else f"[0-{layout.gpus - 1}]"
    return "".join(f"NodeName={node} Name=gpu File={layout.folder}/dev/gpu{gpus}\n" for node in layout.node_names)


def slurm_file(layout: Layout) -> str:
    """`slurm.conf`."""
    # On 127.x addresses srun must answer on any of them, unless all nodes share one.
    listening = {"pid": "NoCtldInAddrAny", "net": "", "none": "NoCtldInAddrAny,NoInAddrAny"}[layout.isolation]
    gpus = f" Gres=gpu:{layout.gpus}" if layout.gpus else ""
    nodes = "\n".join(
        f"NodeName={node} NodeHostname={node} NodeAddr={layout.address(node)} Port={layout.port + layout.number(node)}"
        f" CPUs={layout.cpus} RealMemory={layout.memory_mib}{gpus} State=UNKNOWN"
        for node in layout.node_names
    )
    folder = layout.folder
    return f"""\
ClusterName=throwaway
SlurmctldHost=localhost({layout.controller_address})
SlurmctldPort={layout.port}
SlurmUser={layout.user}
SlurmdUser={layout.user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits cred_expire + 1 s before it starts again; 120 s by default.
AuthInfo=socket={folder}/run/munge.socket,cred_expire=10
{f"CommunicationParameters={listening}" if listening else ""}
StateSaveLocation={folder}/spool/controller
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
{FIXED_SETTINGS}{"GresTypes=gpu" if layout.gpus else ""}
{nodes}
# A job in "high" requeues jobs in "debug", which are warned and have GraceTime seconds to save.
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE \
GraceTime=10 DefMemPerCPU=100
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF DefMemPerCPU=100
"""
