"""`megascale launch`: one plan for SLURM, this machine, Kubernetes, or any scheduler that can run a command."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from megascale.train.start_options import StartOptions

app = typer.Typer(no_args_is_help=True, help="Start a supervised run: on SLURM, here, or as a command for others.")

ConfigPath = Annotated[Path, typer.Argument(help="YAML file of the run.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to the config, such as train.max_steps=300.")]
Nodes = Annotated[int, typer.Option("--nodes", help="Nodes that train.")]
Spares = Annotated[int, typer.Option("--spares", help="Nodes held in reserve, to take the place of bad ones.")]
Cluster = Annotated[str | None, typer.Option(
    "--cluster", metavar="FILE", help="File of the cluster, or the name of one in configs/cluster.")]
RanksPerNode = Annotated[int | None, typer.Option("--ranks-per-node", help="Default: one per GPU.")]
GpusPerNode = Annotated[int | None, typer.Option("--gpus-per-node", help="In place of the cluster's.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Set the folder's run aside, start at step 0.")]
Fork = Annotated[str | None, typer.Option("--fork", metavar="RUN@STEP", help="Begin with another run's checkpoint.")]
AllowChange = Annotated[list[str] | None, typer.Option(
    "--allow-change", metavar="KEY", help="Resume though this key changes what is computed; may be repeated.")]


@app.command()
def slurm(
    config: ConfigPath, nodes: Nodes, overrides: Overrides = None, spares: Spares = 0, cluster: Cluster = None,
    ranks_per_node: RanksPerNode = None, gpus_per_node: GpusPerNode = None,
    time: Annotated[str | None, typer.Option("--time", help="Time limit of a job, such as 23:30:00.")] = None,
    partition: Annotated[str | None, typer.Option(help="In place of the cluster's.")] = None,
    account: Annotated[str | None, typer.Option(help="In place of the cluster's.")] = None,
    qos: Annotated[str | None, typer.Option(help="In place of the cluster's.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Nodes to leave out; may be repeated.")] = None,
    array_restarts: Annotated[int, typer.Option(
        "--array-restarts", metavar="K", help="Submit K jobs in a row, each going on where the last ended.")] = 1,
    container: Annotated[str | None, typer.Option(metavar="IMAGE", help="In place of the cluster's.")] = None,
    job_name: Annotated[str | None, typer.Option("--job-name", help="Default: the run's name.")] = None,
    no_requeue: Annotated[bool, typer.Option("--no-requeue", help="Don't put the job into the queue again.")] = False,
    fresh: Fresh = False, fork: Fork = None, allow_change: AllowChange = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print command and script, write nothing.")] = False,
) -> None:
    """Submit a run to SLURM as one job that restarts itself."""
    from launcher.submit.request import LaunchRequest
    from launcher.submit.slurm import SlurmOptions, launch_slurm

    launch_slurm(LaunchRequest(
        config, tuple(overrides or ()), nodes, spares, cluster, ranks_per_node, gpus_per_node, partition, account, qos,
        container, StartOptions(fresh, fork, tuple(allow_change or ())), not no_requeue, array_restarts,
    ), SlurmOptions(time, tuple(exclude or ()), job_name, dry_run))


@app.command()
def local(
    config: ConfigPath, overrides: Overrides = None,
    nproc: Annotated[int | None, typer.Option("--nproc", help="Ranks of the run. Default: as train takes.")] = None,
    nodes: Nodes = 1, spares: Spares = 0, cluster: Cluster = None, fresh: Fresh = False, fork: Fork = None,
    allow_change: AllowChange = None,
) -> None:
    """Run on this machine with the supervision of a cluster: restarts, hang reports, ledger."""
    from launcher.submit.local import launch_local
    from launcher.submit.request import LaunchRequest
    from launcher.supervise.job import run_local_job

    request = LaunchRequest(config, tuple(overrides or ()), nodes, spares, cluster,
                            options=StartOptions(fresh, fork, tuple(allow_change or ())))
    raise typer.Exit(launch_local(request, nproc, run_local_job))


@app.command("torchrun-print")
def torchrun_print(
    config: ConfigPath, nodes: Nodes, overrides: Overrides = None, cluster: Cluster = None,
    ranks_per_node: RanksPerNode = None, gpus_per_node: GpusPerNode = None,
    address: Annotated[str, typer.Option(help="Name or address of the first node.")] = "FIRST_NODE",
    port: Annotated[int, typer.Option(help="A free port there.")] = 29500,
    fresh: Fresh = False, fork: Fork = None, allow_change: AllowChange = None,
) -> None:
    """Print the command to run on each node under any other scheduler. Nothing restarts such a run by itself."""
    from launcher.submit.request import LaunchRequest, prepare
    from launcher.submit.torchrun import torchrun_commands

    request = LaunchRequest(
        config, tuple(overrides or ()), nodes, 0, cluster, ranks_per_node, gpus_per_node,
        options=StartOptions(fresh, fork, tuple(allow_change or ())),
    )
    launch = prepare(request)
    for note in launch.notes:
        print(f"  {note}", file=sys.stderr)
    for node, command in enumerate(torchrun_commands(launch.plan, request, address, port)):
        print(f"# node {node}\n{command}")


@app.command()
def kubernetes(
    config: ConfigPath, nodes: Nodes,
    image: Annotated[str, typer.Option(help="Container image with megascale in it.")],
    overrides: Overrides = None, cluster: Cluster = None, ranks_per_node: RanksPerNode = None,
    gpus_per_node: GpusPerNode = None,
    claim: Annotated[list[str] | None, typer.Option(
        metavar="NAME:/PATH", help="Volume claim to mount, for run folder and data; may be repeated.")] = None,
    secret: Annotated[str | None, typer.Option(help="Kubernetes secret whose entries become variables.")] = None,
    working_folder: Annotated[str | None, typer.Option(help="Folder that relative paths start from.")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write. Default: print it.")] = None,
    fork: Fork = None, allow_change: AllowChange = None,
) -> None:
    """Write the manifest of a Kubeflow PyTorchJob."""
    from launcher.submit.kubernetes import PodOptions, write_kubernetes
    from launcher.submit.request import LaunchRequest

    write_kubernetes(LaunchRequest(
        config, tuple(overrides or ()), nodes, 0, cluster, ranks_per_node, gpus_per_node,
        options=StartOptions(False, fork, tuple(allow_change or ())),
    ), PodOptions(image, tuple(claim or ()), secret, working_folder), out)
