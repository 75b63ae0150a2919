"""Process groups of a run: the only object that knows other ranks exist. It is made once and passed as an argument."""

import datetime
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megascale.errors import LaunchError
from megascale.parallel.axis import ALONE, Axis, axis_of_group
from megascale.parallel.gloo import one_gloo_thread
from megascale.parallel.layout import Layout
from megascale.parallel.supervision import INCARNATION_VARIABLE, STORE_FD_VARIABLE

GROUPS = (("tp",), ("cp",), ("pp",), ("dp", "cp"), ("pp", "dp", "cp"), ("pp", "tp"))
"""Axes along which groups are made, see `Mesh`."""
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
INCARNATION_KEY = "megascale/incarnation"
INCARNATION_S = 60.0
"""Once it is connected, how long a rank waits for the store to say which attempt it serves: rank 0 says it at once."""


@dataclass(frozen=True)
class RankInfo:
    """Where this process stands, as torchrun's environment says it."""

    rank: int
    local_rank: int
    world_size: int


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the layout, its groups and its device.

    Attributes:
        tp, cp, pp: this rank's peers along one axis.
        ends: the first and the last pipeline rank, of size 1 on all others; a tied embedding lives on both.
        zero_group: the ranks along dp and cp, which hold the same parameters; gradients are summed and ZeRO shards
            over it.
        ep: those of the zero group that share out the experts of a layer.
        expert_group: those of the zero group that hold the same experts as this rank; experts' gradients are summed and
            ZeRO shards them over it. Without expert parallelism the zero group itself.
        loss_group: the ranks along pp, dp and cp, over which the parts of the loss add up.
        model_group: the ranks along pp and tp, which together hold one whole model.
        world_group: all ranks, on the device's backend.
        self_group: a group of this rank alone, for code that wants a group where nothing is shared.
        control_group: all ranks over gloo on CPU tensors, so that small decisions never wait for a GPU.
    """

    layout: Layout
    rank: int
    device: torch.device
    tp: Axis
    cp: Axis
    pp: Axis
    ends: Axis
    zero_group: dist.ProcessGroup
    ep: Axis
    expert_group: dist.ProcessGroup
    loss_group: dist.ProcessGroup
    model_group: dist.ProcessGroup
    world_group: dist.ProcessGroup
    self_group: dist.ProcessGroup
    control_group: dist.ProcessGroup

    @property
    def world_size(self) -> int:
        return self.layout.world_size

    @property
    def dp_rank(self) -> int:
        return self.layout.coordinates(self.rank)["dp"]

    @property
    def leads_replica(self) -> bool:
        """Whether this rank speaks for its replica, whose ranks all read the same rows."""
        return self.tp.rank == self.cp.rank == self.pp.rank == 0

    def split_tp(self, size: int) -> Axis:
        """Neighbouring tp ranks in runs of `size`: this rank's own run as an axis. Every rank calls it."""
        if size == 1:
            return ALONE
        tp_groups = self.layout.groups_along(("tp",))
        runs = [ranks[first : first + size] for ranks in tp_groups for first in range(0, len(ranks), size)]
        return axis_of_group(make_groups(runs, self.rank, "kv"))

    def control_sum(self, values: list[int], dtype: torch.dtype = torch.int64) -> list:
        """Adds up a few numbers over all ranks. Cost: one all-reduce of 8 bytes a value on CPU."""
        totals = torch.tensor(values, dtype=dtype)
        dist.all_reduce(totals, group=self.control_group)
        return totals.tolist()

    def control_gather(self, value: int) -> list[int]:
        """One whole number of every rank, in rank order. Cost: one all-gather of 8 bytes a rank on CPU."""
        values = torch.empty(self.world_size, dtype=torch.int64)
        dist.all_gather(list(values.split(1)), torch.tensor([value], dtype=torch.int64), group=self.control_group)
        return values.tolist()

    def all_true(self, flag: bool) -> bool:
        """Whether the flag is set on every rank."""
        return self.control_sum([int(not flag)])[0] == 0

    def barrier(self) -> None:
        """Waits until every rank has come here."""
        self.control_sum([0])


def read_rank_info(environment: dict[str, str]) -> RankInfo:
    """Reads the place of this process from the variables that torchrun and `megascale train` set.

    Raises:
        LaunchError: a variable is missing.
    """
    lacking = [name for name in RANK_VARIABLES if name not in environment]
    if lacking:
        raise LaunchError(
            f"this rank's environment lacks {', '.join(lacking)} of {', '.join(RANK_VARIABLES)}; start it under"
            " torchrun or srun, or unset RANK and WORLD_SIZE to let `megascale train` start ranks itself"
        )
    return RankInfo(*(int(environment[name]) for name in RANK_VARIABLES[:3]))


def pick_device(local_rank: int) -> torch.device:
    """This rank's GPU, or the CPU on a machine without any.

    Raises:
        LaunchError: more ranks on this machine than it has GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise LaunchError(
            f"local rank {local_rank} has no GPU of its own: this machine has {torch.cuda.device_count()};"
            f" use at most {torch.cuda.device_count()} ranks here, or hide the GPUs to train on the CPU"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def build_mesh(layout: Layout, info: RankInfo, timeout_s: float = 1800.0) -> Mesh:
    """Joins the other ranks and makes the groups. Every rank calls it once."""
    return lay_out_mesh(layout, info.rank, join_ranks(info, timeout_s))


@one_gloo_thread()
def join_ranks(info: RankInfo, timeout_s: float) -> torch.device:
    """Meets the other ranks and returns this one's device.

    Raises:
        LaunchError: the store belongs to another attempt of the run, which this rank or the store is left over from.
    """
    device = pick_device(info.local_rank)
    timeout = datetime.timedelta(seconds=timeout_s)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=open_store(info, timeout, os.environ),
        rank=info.rank, world_size=info.world_size, timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    return device


def open_store(info: RankInfo, timeout: datetime.timedelta, environment: Mapping[str, str]) -> dist.Store:
    """The rendezvous store of this attempt of the run.

    Each attempt has its own prefix in the store: after a restart gloo would otherwise read the addresses of ranks that
    are gone. Where the launcher names the attempt, rank 0 publishes that name first, and the others go on only when it
    is theirs; so none counts as present before it has shown that it belongs.

    Raises:
        LaunchError: the store serves another attempt.
    """
    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    incarnation = environment.get(INCARNATION_VARIABLE)
    socket = environment.get(STORE_FD_VARIABLE) if info.rank == 0 else None
    if socket is not None:
        os.set_inheritable(int(socket), False)
    store = dist.TCPStore(
        host, port, info.world_size,
        is_master=info.rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True", timeout=timeout,
        wait_for_workers=incarnation is None, master_listen_fd=None if socket is None else int(socket),
    )
    if incarnation is None:
        return dist.PrefixStore(f"attempt_{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    if info.rank == 0:
        store.set(INCARNATION_KEY, incarnation)
    else:
        check_incarnation(store, incarnation, f"rank {info.rank}", f"{host}:{port}")
    return dist.PrefixStore(incarnation, store)


def check_incarnation(store: dist.Store, own: str, who: str, where: str) -> None:
    """Makes sure that a store serves the attempt of the run that a rank belongs to.

    Raises:
        LaunchError: it serves another one, or none that it would name.
    """
    try:
        store.wait([INCARNATION_KEY], datetime.timedelta(seconds=INCARNATION_S))
        served = store.get(INCARNATION_KEY).decode(errors="replace")
    except dist.DistStoreError:
        served = f"none that it has named within {INCARNATION_S:.0f} s"
    if served != own:
        raise LaunchError(
            f"{who} belongs to attempt {own}, but the store at {where} serves attempt {served}: a leftover of an"
            " earlier attempt; it was refused"
        )


@one_gloo_thread()
def lay_out_mesh(layout: Layout, rank: int, device: torch.device) -> Mesh:
    """Makes the groups of a layout over the ranks that have joined. Every rank calls it."""
    groups = {axes: make_groups(layout.groups_along(axes), rank, "_".join(axes)) for axes in GROUPS}
    tp, cp, pp = (axis_of_group(groups[axis,]) for axis in ("tp", "cp", "pp"))
    ep, expert_group = expert_parallel(layout, rank, groups["dp", "cp"])
    return Mesh(
        layout=layout,
        rank=rank,
        device=device,
        tp=tp,
        cp=cp,
        pp=pp,
        ends=pipeline_ends(layout, rank),
        zero_group=groups["dp", "cp"],
        ep=ep,
        expert_group=expert_group,
        loss_group=groups["pp", "dp", "cp"],
        model_group=groups["pp", "tp"],
        world_group=dist.group.WORLD,
        self_group=dist.new_group([rank], use_local_synchronization=True, group_desc="self"),
        control_group=dist.new_group(backend="gloo", group_desc="control"),
    )


def close_mesh() -> None:
    """Leaves the process groups; safe to call more than once."""
    if dist.is_initialized():
        dist.destroy_process_group()


def make_groups(groups: list[list[int]], rank: int, name: str) -> dist.ProcessGroup | None:
    """Makes every group, as all ranks must in the same order; gives the one with this rank, None where none has it.

    Args:
        name: of the groups in torch's flight recorder, and so in a report on ranks that hang.
    """
    made = [(ranks, dist.new_group(ranks, group_desc=name)) for ranks in groups]
    return next((group for ranks, group in made if rank in ranks), None)


def pipeline_ends(layout: Layout, rank: int) -> Axis:
    """The first and the last pipeline rank as an axis; one of size 1 for ranks between them. Every rank calls it."""
    if layout.pp == 1:
        return ALONE
    group = make_groups([[ranks[0], ranks[-1]] for ranks in layout.groups_along(("pp",))], rank, "ends")
    return ALONE if group is None else axis_of_group(group)


def expert_parallel(
    layout: Layout, rank: int, zero_group: dist.ProcessGroup
) -> tuple[Axis, dist.ProcessGroup]:
    """The ranks that share out the experts, as an axis, and those that hold the same ones. Every rank calls it.

    Raises:
        LaunchError: the replicas can't be dealt out in groups of ep, which `megascale check` would have said.
    """
    if layout.ep == 1:
        return ALONE, zero_group
    if layout.dp * layout.cp % layout.ep:
        raise LaunchError(
            f"ep {layout.ep} does not divide dp {layout.dp} x cp {layout.cp} = {layout.dp * layout.cp} ranks; run"
            " `megascale check` for the nearest legal layouts"
        )
    ep = axis_of_group(make_groups(layout.expert_groups(), rank, "ep"))
    return ep, make_groups(layout.expert_replica_groups(), rank, "expert_replicas")
