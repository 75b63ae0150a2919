"""Starting ranks: how many, with which environment, and whether this process is one of several."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from launcher.local import check_num_ranks, count_cores, first_cause, given_ranks, rank_environment
from launcher.train import default_num_ranks
from megascale.config.load import load_config
from megascale.errors import EXIT_PEER_LOST, EXIT_RUN, EXIT_USER, LaunchError
from tests.support.tiny_run import command_environment, write_config


@pytest.mark.parametrize("num_ranks", [0, -1, 10_000])
def test_impossible_numbers_of_ranks_are_refused(num_ranks, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(LaunchError, match=rf"--nproc {num_ranks}: this machine has {count_cores()} cores; use 1 to"):
        check_num_ranks(num_ranks)


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    check_num_ranks(2)
    with pytest.raises(LaunchError, match="--nproc 3: this machine has 2 GPUs; use 1 to 2"):
        check_num_ranks(3)


def test_the_default_is_a_number_that_the_batch_allows(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("launcher.train.count_cores", lambda: 6)
    config = load_config(write_config(tmp_path, tmp_path))  # 4 micro-batches of 2 rows in a step
    assert default_num_ranks(config) == 4


def test_torchrun_and_srun_give_the_ranks(monkeypatch):
    assert given_ranks({}) is None
    assert given_ranks({"RANK": "1", "WORLD_SIZE": "2"}) == {}
    assert given_ranks({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"}) is None
    monkeypatch.setattr("launcher.local._first_host", lambda environment: "node7")
    given = given_ranks({
        "SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
    })
    assert (given["RANK"], given["LOCAL_RANK"], given["WORLD_SIZE"]) == ("3", "1", "4")
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("node7", "20007")


@pytest.mark.parametrize(
    ("ended", "number"),
    [
        ([(1, EXIT_USER, "rank 0 failed"), (0, EXIT_USER, "why")], 0),
        ([(0, EXIT_PEER_LOST, None), (2, EXIT_USER, "why"), (1, EXIT_PEER_LOST, None)], 2),
        ([(2, -9, None), (0, EXIT_RUN, None), (1, EXIT_PEER_LOST, None)], 2),
        ([(1, EXIT_RUN, None), (0, EXIT_RUN, None)], 1),
        ([(1, EXIT_PEER_LOST, None), (0, EXIT_PEER_LOST, None)], 1),
    ],
)
def test_the_rank_that_knows_why_is_heard(ended, number):
    """Ranks, their exit codes and messages in the order of their end."""
    failed = [SimpleNamespace(number=rank, code=code, error=error) for rank, code, error in ended]
    assert first_cause(failed).number == number


def test_ranks_without_a_gpu_are_told_so(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert rank_environment(0, 0, 1, "127.0.0.1", 1, 1)["DS_ACCELERATOR"] == "cpu"


def test_planning_needs_no_torch():
    """A login node may not have it, and importing it takes seconds."""
    code = "import sys; import launcher.cli, launcher.check, launcher.train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=command_environment(), check=False).returncode == 0
