"""`python -m launcher.supervise.job PLAN`: the controller of a job, which its batch script turns into."""

import os
import secrets
import sys
import time
from pathlib import Path

from launcher.submit.plan import LaunchPlan, load_plan
from launcher.supervise.controller import Asked, Controller
from launcher.supervise.transports import LocalTransport, SlurmTransport, Transport
from megascale.errors import MegascaleError


def run_job(plan: LaunchPlan, transport: Transport, life: str, launch_folder: Path) -> int:
    """Runs one life of a launch; returns its exit code.

    Raises:
        LaunchError: nothing could be started, or the queue refused the job.
    """
    asked = Asked()
    asked.watch()
    return Controller(plan, transport, life, asked, launch_folder).run()


def run_local_job(plan_path: Path) -> int:
    """Runs a launch on this machine."""
    plan = load_plan(plan_path)
    life = f"local-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    return run_job(plan, LocalTransport(plan), life, plan_path.parent)


def run_slurm_job(plan_path: Path) -> int:
    """Runs the life of a launch that this SLURM job is."""
    plan, environment = load_plan(plan_path), dict(os.environ)
    transport = SlurmTransport(plan, environment)
    life = f"{transport.job_id}.{environment.get('SLURM_RESTART_COUNT', '0')}"
    return run_job(plan, transport, life, plan_path.parent)


def main() -> None:
    """Runs the job that the environment tells of; a user's error is one message."""
    run = run_slurm_job if "SLURM_JOB_ID" in os.environ else run_local_job
    try:
        code = run(Path(sys.argv[1]))
    except MegascaleError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
