"""What a launch is: one value, derived once, from which every launcher writes its script, command or manifest."""

import shlex
from pathlib import Path
from typing import Self

from pydantic import NonNegativeInt, PositiveInt

from megascale.config.base import Section
from megascale.config.cluster import ClusterConfig
from megascale.config.derive import Derived, derive
from megascale.config.schema import RunConfig
from megascale.errors import ConfigError, LaunchError
from megascale.train.start_options import FRESH, StartOptions

PLAN_FILE = "plan.json"
MAX_ATTEMPTS_WITHOUT_PROGRESS = 3
"""Attempts in a row that may end without a new checkpoint before a run is given up."""
MAX_NODE_FAULTS = 2
"""Faults on one node after which it is left out: one may be chance."""


class LaunchPlan(Section):
    """Everything that a launch needs to know; it is kept as `plan.json` beside the job's script."""

    run_name: str
    """Name of the run."""

    run_folder: str
    """Absolute path of the run folder, on every node the same."""

    config: str
    """Absolute path of the config that ranks read: the snapshot, which later edits of the user's file don't change."""

    arguments: tuple[str, ...] = ()
    """Options of `megascale train` that the ranks get besides."""

    nodes: PositiveInt
    """Nodes that train."""

    spares: NonNegativeInt = 0
    """Nodes held in reserve."""

    ranks_per_node: PositiveInt
    """Ranks of each node."""

    cluster: ClusterConfig = ClusterConfig()
    """The cluster's facts."""

    data_folders: tuple[str, ...] = ()
    """Local folders that ranks read from."""

    max_attempts_without_progress: PositiveInt = MAX_ATTEMPTS_WITHOUT_PROGRESS
    """See the constant."""

    is_requeued: bool = True
    """Whether a job that can't go on by itself is put into the queue again."""

    is_chained: bool = False
    """Whether the job is a link of an array, whose next link goes on instead of a requeue."""

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return self.nodes * self.ranks_per_node

    @property
    def folder(self) -> Path:
        """The run folder as a path."""
        return Path(self.run_folder)

    def without_fresh(self) -> Self:
        """The same for a later attempt, which must go on with what the first one began."""
        return self.model_copy(update={"arguments": tuple(word for word in self.arguments if word != FRESH)})


def derive_plan(
    config: RunConfig, cluster: ClusterConfig, nodes: int, *, config_path: Path, spares: int = 0,
    ranks_per_node: int | None = None, options: StartOptions | None = None, data_folders: tuple[str, ...] = (),
    is_requeued: bool = True, is_chained: bool = False,
) -> tuple[LaunchPlan, Derived]:
    """Lays a run out over nodes.

    Raises:
        ConfigError: the config can't run on so many ranks.
        LaunchError: it can't be told how many ranks a node has, or there are no nodes.
    """
    ranks = ranks_per_node or cluster.num_ranks_per_node
    if ranks is None:
        raise LaunchError(
            f"cluster {cluster.name}: gpus_per_node = 0 and ranks_per_node isn't set, so the ranks of a node are"
            " unknown; set one of them in the cluster's file, or give --ranks-per-node"
        )
    if nodes < 1 or spares < 0 or ranks < 1:
        raise LaunchError(f"--nodes {nodes} --spares {spares} --ranks-per-node {ranks}: use 1 or more nodes and ranks")
    if cluster.gpus_per_node and ranks > cluster.gpus_per_node:
        raise LaunchError(f"{ranks} ranks on a node of {cluster.gpus_per_node} GPUs (cluster {cluster.name}); use one"
                          f" rank per GPU, at most {cluster.gpus_per_node}")
    plan = LaunchPlan(
        run_name=config.run.name, run_folder=str(Path(config.run.folder).absolute()),
        config=str(config_path.absolute()), arguments=tuple(options.to_arguments()) if options else (),
        nodes=nodes, spares=spares, ranks_per_node=ranks, cluster=cluster, data_folders=data_folders,
        is_requeued=is_requeued, is_chained=is_chained,
    )
    return plan, derive(config, plan.world_size, source=str(config_path))


def load_plan(path: Path) -> LaunchPlan:
    """Reads a plan that `save_plan` wrote.

    Raises:
        ConfigError: it can't be read, or is damaged.
    """
    try:
        return LaunchPlan.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: can't be read as a launch plan: {error}") from None


def dump_plan(plan: LaunchPlan) -> str:
    """The plan as JSON that `load_plan` reads."""
    return plan.model_dump_json(indent=2) + "\n"


def shell_words(words: list[str]) -> str:
    """A command as one line that a shell takes apart into just these words."""
    return " ".join(shlex.quote(word) for word in words)
