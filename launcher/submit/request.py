"""What a user asks of a launch, the checks that every kind of launch shares, and the plan that follows."""

from dataclasses import dataclass, field
from pathlib import Path

from launcher.check import describe_corpora
from launcher.submit.plan import LaunchPlan, derive_plan
from megascale.config.cluster import ClusterConfig, load_cluster
from megascale.config.derive import Derived
from megascale.config.load import load_config
from megascale.config.resume_rules import check_allowed_keys
from megascale.config.schema import RunConfig
from megascale.data.location import is_local, local_path
from megascale.errors import LaunchError
from megascale.train.start_options import StartOptions

CODE_FOLDER = Path(__file__).resolve().parents[2]
"""The checkout, or the packages folder, that this code runs from."""
CLUSTERS_FOLDER = CODE_FOLDER / "configs" / "cluster"


@dataclass(frozen=True)
class LaunchRequest:
    """A launch as it was asked for.

    Attributes:
        config_path, overrides: of the run.
        nodes, spares: nodes that train, and those held in reserve.
        cluster: file of the cluster, or the name of one in configs/cluster; None for the defaults.
        ranks_per_node, gpus_per_node, partition, account, qos: in place of the cluster's, None to keep them.
        options: what the ranks are asked to do besides.
        is_requeued: whether a job may be put into the queue again.
        num_links: jobs in a chain, each going on where the one before it ended; 1 for no chain.
    """

    config_path: Path
    overrides: tuple[str, ...] = ()
    nodes: int = 1
    spares: int = 0
    cluster: str | None = None
    ranks_per_node: int | None = None
    gpus_per_node: int | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    container: str | None = None
    options: StartOptions = field(default_factory=StartOptions)
    is_requeued: bool = True
    num_links: int = 1


@dataclass(frozen=True)
class Launch:
    """A request that passed all checks which need no scheduler.

    Attributes:
        notes: lines for the user: what was found, what couldn't be checked from here.
    """

    config: RunConfig
    plan: LaunchPlan
    derived: Derived
    notes: tuple[str, ...]


def prepare(request: LaunchRequest) -> Launch:
    """Reads config and cluster, lays the run out over the nodes, and looks at the corpora that can be reached.

    Raises:
        ConfigError: the config or the cluster's file is wrong, or the layout doesn't fit the nodes.
        DataError: a corpus is there and can't be trained on.
        LaunchError: a name that no script should hold, or an impossible number of nodes.
    """
    for name, text in (("the config's path", request.config_path), ("the working directory", Path.cwd()),
                       *(("override", text) for text in request.overrides)):
        check_printable(name, str(text))
    config = load_config(request.config_path, request.overrides)
    check_printable("run.folder", config.run.folder)
    check_allowed_keys(request.options.allowed, config)
    cluster = choose_cluster(request)
    folders = tuple(
        str(local_path(source.folder).absolute()) for source in config.data.sources.values() if is_local(source.folder)
    )
    plan, derived = derive_plan(
        config, cluster, request.nodes, config_path=request.config_path, spares=request.spares,
        ranks_per_node=request.ranks_per_node, options=request.options, data_folders=folders,
        is_requeued=request.is_requeued, is_chained=request.num_links > 1,
    )
    notes = [f"{name}: {value}" for name, value in describe_corpora(config, derived)]
    return Launch(config, plan, derived, tuple(notes))


def choose_cluster(request: LaunchRequest) -> ClusterConfig:
    """The cluster's facts, with what the command line says in their place.

    Raises:
        ConfigError, LaunchError: there is no such file, or it is wrong.
    """
    cluster = load_cluster(find_cluster(request.cluster)) if request.cluster else ClusterConfig()
    given = {name: getattr(request, name) for name in ("gpus_per_node", "partition", "account", "qos")}
    if request.container is not None:
        kind = cluster.container.kind if cluster.container else "pyxis"
        mounts = cluster.container.mounts if cluster.container else ()
        given["container"] = {"kind": kind, "image": request.container, "mounts": mounts}
    changes = {name: value for name, value in given.items() if value is not None}
    for name, value in changes.items():
        check_printable(name, str(value))
    if "gpus_per_node" in changes and changes["gpus_per_node"] < 0:
        raise LaunchError(f"--gpus-per-node {changes['gpus_per_node']}: use 0 for the CPU, or the GPUs of a node")
    return ClusterConfig.model_validate(cluster.model_dump() | changes)


def find_cluster(name: str) -> Path:
    """The file of a cluster given by path, or by its name in configs/cluster.

    Raises:
        LaunchError: there is neither.
    """
    known = {path.stem: path for path in sorted(CLUSTERS_FOLDER.glob("*.yaml"))}
    if Path(name).is_file():
        return Path(name)
    if name in known:
        return known[name]
    raise LaunchError(f"--cluster {name!r}: no such file, and none of the clusters in {CLUSTERS_FOLDER}:"
                      f" {', '.join(known) or 'none at all'}")


def check_printable(what: str, text: str) -> None:
    """Refuses line breaks and other control characters, which no script or log line should hold.

    Raises:
        LaunchError: there are some.
    """
    if not text.isprintable():
        raise LaunchError(f"{what} {text!r} holds a line break, control character or undecodable byte; rename it,"
                          " every other character is fine")
