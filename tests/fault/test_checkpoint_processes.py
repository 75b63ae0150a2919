"""Saving and loading over real process groups: the mesh serves as the checkpoint's `Comm`, and a rank may die."""

import pytest

from megascale.checkpoint.comm import LocalComm
from megascale.checkpoint.find import find_checkpoint
from megascale.checkpoint.folders import list_steps
from megascale.checkpoint.local_store import LocalStore
from tests.support.ranks import run_ranks

PROGRAM = "tests.fault.programs.checkpoint_rank"


def test_two_processes_save_find_and_load(tmp_path):
    """Mutation: gathering a bool instead of an integer, as rank 0's answers once were, fails in gloo."""
    run_ranks(PROGRAM, 2, [str(tmp_path), "whole"], tmp_path)
    assert list_steps(tmp_path) == [6]
    assert find_checkpoint(LocalStore(tmp_path), run_id="run-a", comm=LocalComm()).index.state.step == 6


def test_sigkill_of_one_process_in_a_save_leaves_the_old_checkpoint(tmp_path):
    """Mutation: committing before rank 1 has acknowledged leaves a step 6 that lacks its file."""
    with pytest.raises(AssertionError, match=r"exit codes \[.*-9\]"):
        run_ranks(PROGRAM, 2, [str(tmp_path), "killed"], tmp_path)
    found = find_checkpoint(LocalStore(tmp_path), run_id="run-a", comm=LocalComm())
    assert (found.index.state.step, found.rejected) == (3, ())
