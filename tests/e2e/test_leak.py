"""`megascale check --leak` from the command line: what it prints, a mask that it finds at fault, what it refuses."""

import subprocess
import sys

import pytest

from tests.support.ranks import REPOSITORY
from tests.support.tiny_run import command_environment, megascale, write_config

MASKED = "data.document_mask=true"


@pytest.fixture
def config(tmp_path):
    """The tiny config, without a corpus: the leak test needs none."""
    return write_config(tmp_path, tmp_path / "nowhere")


def test_the_tables_and_the_verdict(corpus, tmp_path):
    done = megascale("check", write_config(tmp_path, corpus), "--leak", "--nproc", "1", MASKED)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tokens per step" in done.stdout
    for rows in ("random documents", "rows of the corpus"):
        assert f"leak test, {rows}: attention with a dense mask, fp32, one rank" in done.stdout
    assert done.stdout.splitlines()[-1] == "no document sees another"
    assert not (tmp_path / "run").exists()


def test_a_mask_that_forgets_documents_is_found(config):
    """The planted fault is the mutation."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.programs.leak_fault", "check", str(config), "--leak", "--nproc", "1", MASKED],
        env=command_environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.startswith("error: a document leaks into another under attention with a dense mask, fp32")
    assert "first in the output of blocks.0" in done.stderr
    assert "no document sees another" not in done.stdout


@pytest.mark.parametrize(("arguments", "said"), [
    ([], "Use data.document_mask=true to keep them apart"),
    ([MASKED, "precision.dtype=bf16", "precision.fp8_linear=true"], "Test the mask with precision.fp8_linear=false"),
    ([MASKED, "model.family=moe", "model.moe.num_experts=4"], "Test the mask without model.moe"),
    ([MASKED, "data.objective.kind=mlm", "model.family=bert"], "objective is mlm"),
    ([MASKED, "--nproc", "512"], "--nproc 512"),
    ([MASKED, "parallel.tp=4"], "parallel.tp = 4 does not divide model.num_heads = 2"),
])
def test_what_it_refuses_before_anything_runs(config, arguments, said):
    done = megascale("check", config, "--leak", *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr
    assert "leak test" not in done.stdout
