"""`megascale launch slurm`: checks everything, keeps a snapshot, submits one job."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.submit.plan import MAX_NODE_FAULTS, shell_words
from launcher.submit.request import CODE_FOLDER, Launch, LaunchRequest, prepare
from launcher.submit.run_folder import check_not_live, check_run_folder, remove_requests
from launcher.submit.scheduler import SchedulerAwayError, ask, ask_nodes, check_nodes, find_sbatch, job_is_live
from launcher.submit.script import JobOptions, read_template, render_script, sbatch_command
from launcher.submit.snapshot import SCRIPT_FILE, check_no_secrets, name_submission, write_job, write_snapshot
from launcher.submit.time_limit import check_time_limit, choose_step_time
from launcher.supervise.records import LAUNCH_FOLDER, LOGS_FOLDER, excluded_nodes, read_node_faults
from megascale.config.dump import resolved_values, to_yaml
from megascale.config.target import target_len
from megascale.errors import LaunchError
from megascale.model.flops import train_flops_per_token
from megascale.observe.run_files import SESSIONS_FILE, read_json_lines, read_metrics, write_atomically

NO_SBATCH = ("sbatch is not on this machine: run this on a login node of the cluster, or with --dry-run to see the"
             " script, or use `megascale launch torchrun-print` for another scheduler")


@dataclass(frozen=True)
class SlurmOptions:
    """What a job of SLURM is asked for besides the launch, see `JobOptions`."""

    time: str | None = None
    excluded: tuple[str, ...] = ()
    job_name: str | None = None
    is_dry: bool = False


def launch_slurm(request: LaunchRequest, asked: SlurmOptions) -> str | None:
    """Submits a run to SLURM, or shows what would be submitted.

    Returns:
        The job's id; None for a dry run, which writes nothing.

    Raises:
        MegascaleError: bad input, before anything was written; or the scheduler refuses the job.
    """
    if not asked.is_dry and find_sbatch() is None:
        raise LaunchError(NO_SBATCH)
    launch = prepare(request)
    remembered = excluded_nodes(read_node_faults(launch.plan.folder), MAX_NODE_FAULTS)
    options = JobOptions(
        asked.job_name or launch.plan.run_name, asked.time, tuple(dict.fromkeys((*asked.excluded, *remembered))),
        request.num_links,
    )
    launch_folder = launch.plan.folder / LAUNCH_FOLDER / name_submission()
    script = render_script(launch.plan, launch_folder / "plan.json", options, read_template())
    command = sbatch_command(launch.plan, options, str(launch_folder / SCRIPT_FILE), Path.cwd())
    notes = [*check_launch(launch, request, options.time), *check_scheduler(launch, options.time, is_dry=asked.is_dry)]
    for note in (*notes, *(f"left out: node {node}: {reason}" for node, reason in remembered.items())):
        print(f"  {note}")
    if asked.is_dry:
        _show_dry_run(command, script)
        return None
    write_launch(launch, launch_folder)
    remove_requests(launch.plan.folder)  # before the job can look
    job_id = submit(launch_folder, command, script)
    _show_job(launch, job_id, options)
    return job_id


def check_launch(launch: Launch, request: LaunchRequest, time: str | None) -> list[str]:
    """Checks run folder, secrets and time limit. Writes nothing.

    Returns:
        Lines for the user.

    Raises:
        MegascaleError: the first thing that is wrong.
    """
    plan = launch.plan
    notes = [f"{plan.nodes} nodes{f' + {plan.spares} spares' if plan.spares else ''} x {plan.ranks_per_node} ranks ="
             f" {plan.world_size} ranks, dp {launch.derived.dp}", *launch.notes]
    check_run_folder(plan.folder)
    check_no_secrets(to_yaml(resolved_values(launch.config)), str(request.config_path), os.environ)
    check_no_secrets(plan.model_dump_json(), f"cluster {plan.cluster.name}", os.environ)
    if time is not None:
        config = launch.config
        step = choose_step_time(
            read_metrics(plan.folder), read_json_lines(plan.folder / SESSIONS_FILE), plan.world_size,
            config.train.global_batch_tokens,
            train_flops_per_token(config.model, config.train.seq_len, target_len(config)),
            plan.cluster.peak_flops_per_device,
        )
        check_time_limit(time, plan.cluster.grace_s, config.checkpoint.interval_steps, step)
    return notes


def check_scheduler(launch: Launch, time: str | None, *, is_dry: bool) -> list[str]:
    """Checks that no job of the run lives, and that the partition could run one. Writes nothing.

    Returns:
        Lines for the user. A dry run without a scheduler gets one that says what wasn't checked.

    Raises:
        LaunchError: the first thing that is wrong, and a scheduler that doesn't answer unless `is_dry`.
    """
    plan = launch.plan
    try:
        if find_sbatch() is None:
            raise SchedulerAwayError("there is no sbatch on this machine")
        check_not_live(plan.folder, job_is_live)
        partition = check_nodes(ask_nodes(), plan.cluster, plan.nodes + plan.spares, time)
    except SchedulerAwayError as error:
        if not is_dry:
            raise
        check_not_live(plan.folder, None)
        return [f"not checked: partition, GPUs, nodes and jobs of this run: {str(error).splitlines()[0]}"]
    return [f"partition {partition}: has the nodes"]


def write_launch(launch: Launch, launch_folder: Path) -> Path:
    """Writes the snapshot of a launch, and the folder of its logs.

    Returns:
        Path of the plan.

    Raises:
        LaunchError: the run folder can't be written.
    """
    write_snapshot(launch_folder, launch.plan, launch.config, CODE_FOLDER, os.environ)
    (launch.plan.folder / LOGS_FOLDER).mkdir(exist_ok=True)
    return launch_folder / "plan.json"


def submit(launch_folder: Path, command: Sequence[str], script: str) -> str:
    """Writes the script, submits it and notes the job's id.

    Raises:
        LaunchError: sbatch refuses; the launch folder is removed, since no job came of it.
    """
    write_atomically(launch_folder / SCRIPT_FILE, script.encode())
    try:
        answer = ask(command)
        job_id = answer.stdout.strip().splitlines()[-1].split(";")[0] if answer.stdout.strip() else ""
        if answer.returncode or not job_id.isdigit():
            raise LaunchError(f"sbatch refused the job: {answer.stderr.strip() or answer.stdout.strip()}\nthe command:"
                              f" {shell_words(list(command))}")
    except LaunchError:
        shutil.rmtree(launch_folder)
        raise
    write_job(launch_folder, job_id, list(command))
    return job_id


def _show_dry_run(command: list[str], script: str) -> None:
    print(f"the command:\n{shell_words(command)}\nthe script:\n{script}", end="")


def _show_job(launch: Launch, job_id: str, options: JobOptions) -> None:
    folder = launch.plan.folder
    number = f"{job_id}_*" if options.num_links > 1 else job_id
    run = shell_words([str(folder)])
    print(f"submitted job {job_id}" + (f", a chain of {options.num_links}" if options.num_links > 1 else ""))
    for name, value in (
        ("log", folder / LOGS_FOLDER / f"slurm_{number}.log"), ("ranks", folder / LOGS_FOLDER / f"{job_id}.*"),
        ("look", f"megascale status {run}"), ("read", f"megascale logs {run}"), ("stop", f"megascale stop {run}"),
    ):
        print(f"  {name:<6} {value}")
