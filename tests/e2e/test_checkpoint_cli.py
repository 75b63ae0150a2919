"""`megascale checkpoint` on what a real run left: list, verify, diff, prune."""

import json
import shutil

import pytest

from megascale.checkpoint.folders import checkpoint_path, list_steps
from megascale.checkpoint.lease import RunLease
from megascale.errors import EXIT_DIFFERENT, EXIT_USER
from tests.support.tiny_run import megascale

# The run saved at steps 3, 6, 9 and 12 and kept the last 3; it was evaluated at 4, 8 and 12.


def checkpoint(*arguments, returncode=0):
    """Runs a command that is to end with this code; gives what it printed to both streams."""
    done = megascale("checkpoint", *arguments)
    assert done.returncode == returncode, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def run_folder(clean, tmp_path):
    return shutil.copytree(clean, tmp_path / "run")


def flip_last_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_list_shows_steps_losses_and_reasons(clean):
    listing = json.loads(checkpoint("list", clean, "--json"))
    assert [one["step"] for one in listing["checkpoints"]] == [6, 9, 12]
    assert all(one["kept"] == ["last"] and one["problem"] is None for one in listing["checkpoints"])
    assert [one["num_files"] for one in listing["checkpoints"]] == [2, 2, 2]
    assert listing["checkpoints"][0]["validation_loss"] is None
    assert listing["checkpoints"][2]["validation_loss"] > 0
    assert listing["checkpoints"][2]["probe_loss"] > 0
    table = checkpoint("list", clean)
    assert f"{listing['checkpoints'][2]['validation_loss']:.4f}" in table
    assert "last 3, every no steps, best 0" in table


def test_verify_passes_a_whole_run_and_names_the_damage(run_folder, tmp_path):
    """Mutation: an exit code 0 for a damaged one; `--all` that stops at the first whole one."""
    whole = checkpoint("verify", run_folder, "--all")
    assert whole.count("ok: ") == 3
    assert "MB/s" in whole
    flip_last_byte(checkpoint_path(run_folder, 6) / "rank_00001.safetensors")
    assert "step_00000012" in checkpoint("verify", run_folder)
    damaged = checkpoint("verify", run_folder, "--all", returncode=EXIT_DIFFERENT)
    assert damaged.count("ok: ") == 2
    assert "file rank_00001.safetensors: SHA-256" in damaged
    assert damaged.count("  tensor ") == 1
    copy = shutil.copytree(checkpoint_path(run_folder, 6), tmp_path / "copy")
    assert "DAMAGED" in checkpoint("verify", copy, returncode=EXIT_DIFFERENT)
    flip_last_byte(copy / "index.json")
    assert "DAMAGED" in checkpoint("verify", copy, returncode=EXIT_DIFFERENT)
    assert "those of steps 6, 9, 12 are there" in checkpoint("verify", run_folder, "--step", "7", returncode=EXIT_USER)
    assert "no such folder" in checkpoint("verify", tmp_path / "none", returncode=EXIT_USER)


def test_diff_tells_equal_from_different(clean, tmp_path):
    """Mutation: an exit code by state instead of by tensors."""
    copy = shutil.copytree(checkpoint_path(clean, 12), tmp_path / "copy")
    same = checkpoint("diff", clean, copy)
    assert "0 different" in same
    other = checkpoint("diff", f"{clean}@9", f"{clean}@12", "--values", returncode=EXIT_DIFFERENT)
    assert "state: step: 9 in A, 12 in B" in other
    assert "config:" not in other
    assert "master/" in other
    assert "max |a - b|" in other


def test_prune_deletes_under_the_lease_and_keeps_a_verified_one(run_folder):
    """Mutation: `--dry-run` that deletes; pruning past a lease that another process holds."""
    dry = checkpoint("prune", run_folder, "--keep-last", "1", "--keep-best", "1", "--dry-run")
    assert "would be deleted: step 6" in dry
    with RunLease.take(run_folder):
        assert "is in use by process" in checkpoint("prune", run_folder, "--keep-last", "1", returncode=EXIT_USER)
    assert list_steps(run_folder) == [6, 9, 12]
    pruned = checkpoint("prune", run_folder, "--keep-last", "1", "--keep-best", "1")
    assert "kept: step 12 (last, best)" in pruned
    assert list_steps(run_folder) == [12]
    assert "ok: " in checkpoint("verify", run_folder)
