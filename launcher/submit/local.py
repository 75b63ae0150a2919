"""`megascale launch local`: the same plan and supervision on this machine, whose nodes are only thought of."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from launcher.local import check_num_ranks, count_gpus
from launcher.submit.request import Launch, LaunchRequest, prepare
from launcher.submit.run_folder import check_not_live, check_run_folder, remove_requests
from launcher.submit.scheduler import SchedulerAwayError, find_sbatch, job_is_live
from launcher.submit.slurm import write_launch
from launcher.submit.snapshot import check_no_secrets, name_submission
from launcher.supervise.records import LAUNCH_FOLDER
from launcher.train import default_num_ranks
from megascale.config.dump import resolved_values, to_yaml
from megascale.config.load import load_config
from megascale.errors import LaunchError


def launch_local(request: LaunchRequest, num_ranks: int | None, run_job: Callable[[Path], int]) -> int:
    """Runs a supervised job on this machine, to its end.

    Args:
        num_ranks: ranks of the run, dealt out over the nodes evenly; None for as many as `megascale train` takes.
        run_job: runs the job of a plan's file and returns its exit code.

    Raises:
        MegascaleError: bad input, before anything was written.
    """
    launch = prepare_local(request, num_ranks)
    folder = launch.plan.folder
    check_run_folder(folder)
    try:
        check_not_live(folder, job_is_live if find_sbatch() else None)
    except SchedulerAwayError:  # its packages alone don't make a cluster
        check_not_live(folder, None)
    check_no_secrets(to_yaml(resolved_values(launch.config)), str(request.config_path), os.environ)
    plan_path = write_launch(launch, folder / LAUNCH_FOLDER / name_submission())
    remove_requests(folder)
    return run_job(plan_path)


def prepare_local(request: LaunchRequest, num_ranks: int | None) -> Launch:
    """Checks and lays out a run over this machine's nodes.

    Raises:
        MegascaleError: bad input, or ranks that can't be dealt out evenly.
    """
    if request.nodes < 1:
        raise LaunchError(f"--nodes {request.nodes}: use 1 or more")
    if count_gpus() and request.nodes + request.spares > 1:
        raise LaunchError(f"--nodes {request.nodes} --spares {request.spares}: nodes that are only thought of would"
                          f" share this machine's {count_gpus()} GPUs; use one node without spares, or hide the GPUs"
                          " (CUDA_VISIBLE_DEVICES=) to train on the CPU")
    if num_ranks is None:
        usual = default_num_ranks(load_config(request.config_path, request.overrides))
        num_ranks = max(usual - usual % request.nodes, request.nodes)
    check_num_ranks(num_ranks)
    if num_ranks % request.nodes:
        below = num_ranks - num_ranks % request.nodes
        legal = " or ".join(str(n) for n in (below, below + request.nodes) if n)
        raise LaunchError(f"--nproc {num_ranks}: the ranks of the run can't be dealt out evenly over --nodes"
                          f" {request.nodes}; use --nproc {legal}")
    per_node = num_ranks // request.nodes
    return prepare(replace(request, ranks_per_node=per_node, gpus_per_node=per_node if count_gpus() else 0))
