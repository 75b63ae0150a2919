"""A job goes back into the queue while SLURM already ends all its processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCONTROL = """#!/bin/bash
echo "$@" >> {folder}/calls
case "$1" in
  requeue) (sleep 0.1; kill -TERM -- -$(ps -o pgid= $$ | tr -d ' ')) & sleep 0.3 ;;
  update) sleep 0.3; echo done >> {folder}/calls; echo "{error}" >&2; exit {code} ;;
  -o) echo "JobId=7 ExcNodeList=node[5-6] Requeue=1" ;;
  *) echo node5; echo node6 ;;
esac
"""
PROGRAM = """
from types import SimpleNamespace
from launcher.supervise.transports import SlurmTransport
plan = SimpleNamespace(is_requeued=True, is_chained=False, cluster=SimpleNamespace(cpus_per_node=1))
SlurmTransport(plan, {"SLURM_JOB_NODELIST": "node5,node6", "SLURM_JOB_ID": "7"}).requeue(WITHOUT)
print("ended in good order")
"""


def requeue(folder: Path, without: list[str], code: int = 0, error: str = "") -> tuple[str, list[str]]:
    """What the job says as SLURM ends it, and scontrol's calls after the first."""
    script = folder / "scontrol"
    script.write_text(SCONTROL.format(folder=folder, code=code, error=error))
    script.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("WITHOUT", repr(without))], capture_output=True, text=True, timeout=60,
        env=os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}, start_new_session=True, check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "ended in good order" in done.stdout
    return done.stdout + done.stderr, (folder / "calls").read_text().splitlines()[1:]


def test_nodes_are_left_out_though_the_end_comes_first(tmp_path: Path):
    """Caught: SIGTERM not blocked, by which scontrol was ended before it had told SLURM."""
    _, calls = requeue(tmp_path, ["node1", ""])
    assert calls[0] == "requeue 7"
    assert calls[-2:] == ["update jobid=7 excnodelist=node1,node5,node6", "done"]


@pytest.mark.parametrize("without", [[], [""]])
def test_without_a_faulty_node_nothing_else_is_asked(tmp_path: Path, without: list[str]):
    assert requeue(tmp_path, without)[1] == ["requeue 7"]


def test_a_refused_update_is_a_warning_for_the_job_is_requeued(tmp_path: Path):
    said, _ = requeue(tmp_path, ["node1"], 1, "invalid node")
    assert "warning: job 7 may come back onto node1: scontrol update" in said
