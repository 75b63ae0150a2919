"""The job's script and sbatch's command line, from a plan. Pure, apart from reading the template.

Options whose value can only be a number or a plain name stand in the script as `#SBATCH` lines. The others are
arguments of sbatch, which nothing takes apart. What bash sees is quoted.
"""

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from launcher.submit.plan import LaunchPlan
from launcher.submit.request import CODE_FOLDER, check_printable
from launcher.submit.time_limit import parse_time_limit
from megascale.config.cluster import ClusterConfig
from megascale.errors import LaunchError

TEMPLATE = CODE_FOLDER / "slurm" / "job.sbatch"
HOLE = re.compile(r"\{\{([A-Z_]+)\}\}")
PLAIN_NAMES = re.compile(r"[A-Za-z0-9_.,+@-]+")
NODE_LIST = re.compile(r"[A-Za-z0-9_.,\[\]-]+")
INSTALLED = ("site-packages", "dist-packages")


@dataclass(frozen=True)
class JobOptions:
    """What a job is asked for besides its plan.

    Attributes:
        job_name: name in the queue.
        time: limit in one of SLURM's forms, None for the partition's.
        excluded: nodes to leave out.
        num_links: jobs in a chain.
    """

    job_name: str
    time: str | None = None
    excluded: tuple[str, ...] = ()
    num_links: int = 1


def check_job_options(plan: LaunchPlan, options: JobOptions) -> None:
    """Refuses values that are no names or times of SLURM.

    Raises:
        LaunchError: there is one.
    """
    check_printable("--job-name", options.job_name)
    if not options.job_name.strip():
        raise LaunchError("--job-name is empty; leave it out for the run's name")
    for name in ("partition", "account", "qos"):
        value = getattr(plan.cluster, name)
        if value is not None and not PLAIN_NAMES.fullmatch(value):
            raise LaunchError(f"--{name} {value!r}: not a name of SLURM; letters, digits and _ . , + @ - are")
    for node in options.excluded:
        if not NODE_LIST.fullmatch(node):
            raise LaunchError(f"--exclude {node!r}: not a list of nodes; write node3,node7 or node[3-5]")
    if options.num_links < 1:
        raise LaunchError(f"--array-restarts {options.num_links}: use 1 for a single job, or the number of jobs in a"
                          " row")
    if options.time is not None:
        parse_time_limit(options.time)


def render_script(plan: LaunchPlan, plan_path: Path, options: JobOptions, template: str) -> str:
    """Fills the template in. A paragraph of its head with a value that wasn't asked for is left out.

    Raises:
        LaunchError: see `check_job_options`.
    """
    check_job_options(plan, options)
    cluster = plan.cluster
    values = {
        "NODES": str(plan.nodes + plan.spares), "PARTITION": cluster.partition or "", "ACCOUNT": cluster.account or "",
        "QOS": cluster.qos or "", "CPUS": str(cluster.cpus_per_node or ""), "MEMORY": cluster.memory_per_node or "",
        "EXCLUSIVE": "--exclusive" if cluster.is_exclusive else "", "TIME": options.time or "",
        "SIGNAL": cluster.signal, "GRACE": str(cluster.grace_s),
        "REQUEUE": "--requeue" if plan.is_requeued else "--no-requeue",
        "ARRAY": f"1-{options.num_links}%1" if options.num_links > 1 else "",
        "NO_KILL": "--no-kill" if plan.spares else "",
        "PYTHON": shlex.quote(controller_python(cluster)), "PLAN": shlex.quote(str(plan_path)),
        "CODE": shlex.quote(code_folder()), "SETUP": _setup(cluster), **_gpu_request(cluster),
    }
    paragraphs = []
    for paragraph in template.rstrip("\n").split("\n\n"):
        holes = HOLE.findall(paragraph)
        if "#SBATCH" in paragraph and any(not values[name] for name in holes):
            continue
        paragraphs.append(HOLE.sub(lambda hole: values.get(hole[1], hole[0]), paragraph).rstrip("\n"))
    return "\n\n".join(paragraphs) + "\n"


def sbatch_command(plan: LaunchPlan, options: JobOptions, script: str, working_folder: Path) -> list[str]:
    """The command that submits a script.

    Its job works in the folder of the launch, so that relative paths in the config mean the same.
    """
    number = "%A_%a" if options.num_links > 1 else "%j"
    log = f"{str(plan.folder / 'logs').replace('%', '%%')}/slurm_{number}.log"
    return [
        "sbatch", "--parsable", f"--job-name={options.job_name}", f"--chdir={working_folder}", f"--output={log}",
        *([f"--exclude={','.join(options.excluded)}"] if options.excluded else []), *plan.cluster.sbatch, script,
    ]


def controller_python(cluster: ClusterConfig) -> str:
    """Python of the controller; with a container it runs outside of it, where the scheduler's commands are."""
    return sys.executable if cluster.container or not cluster.python else cluster.python


def code_folder() -> str:
    """The checkout for PYTHONPATH; empty for an installed package, which its Python finds by itself."""
    return "" if CODE_FOLDER.name in INSTALLED else str(CODE_FOLDER)


def read_template() -> str:
    """The script's template.

    Raises:
        LaunchError: this installation has none.
    """
    try:
        return TEMPLATE.read_text(encoding="utf-8")
    except OSError as error:
        raise LaunchError(f"{TEMPLATE}: can't be read: {error.strerror}; launch from a checkout of megascale") from None


def _gpu_request(cluster: ClusterConfig) -> dict[str, str]:
    wanted = f"{cluster.gpu_type}:" if cluster.gpu_type else ""
    request = f"{wanted}{cluster.gpus_per_node}" if cluster.gpus_per_node else ""
    return {
        "GPUS": request if cluster.gpu_request == "gpus-per-node" else "",
        "GRES": f"gpu:{request}" if request and cluster.gpu_request == "gres" else "",
    }


def _setup(cluster: ClusterConfig) -> str:
    """Modules and lines of the site. The lines are bash, as the cluster's file has them."""
    lines = []
    if cluster.modules:
        lines += ["", "# Modules of the cluster's file.",
                  "command -v module >/dev/null || . /etc/profile  # a batch shell may lack the function"]
        lines += [f"module load {shlex.quote(name)} || exit 2" for name in cluster.modules]
    if cluster.setup:
        lines += ["", "# Lines of the cluster's file.", *cluster.setup]
    return "\n".join(lines)
