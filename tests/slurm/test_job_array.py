"""A corpus tokenized by a job array, and merged by a job that waits for it."""

import sys
from pathlib import Path
from shlex import quote

from tests.slurm.cluster import SlurmCluster
from tests.support.corpus import make_text
from tests.support.ranks import REPOSITORY
from tests.support.tiny_run import megascale
from tests.unit.test_tools_build import documents

COUNT = 3


def test_array_tokenizes_and_a_dependent_job_merges(cluster: SlurmCluster, tmp_path: Path):
    """Also when one task is requeued while it runs."""
    text = make_text(tmp_path / "text")
    built = megascale("data", "build", text, "--out", tmp_path / "whole", "--vocab-size", "300", "--workers", "1",
                      "--validation-fraction", "0.2")
    assert built.returncode == 0, built.stderr
    command = f"exec {quote(sys.executable)} -m launcher data"
    options = (f"--output={tmp_path}/task_%a.log", "--open-mode=append", f"--chdir={REPOSITORY}")
    tokenize = cluster.submit(
        f"{command} tokenize {quote(str(text))} --tokenizer {quote(str(tmp_path / 'whole/tokenizer.json'))}"
        f" --out {quote(str(tmp_path / 'out'))} --validation-fraction 0.2 --workers 1 --array slurm",
        f"--array=0-{COUNT - 1}", "--requeue", *options,
    )
    merge = cluster.submit(f"{command} merge {quote(str(tmp_path / 'out'))}", f"--dependency=afterok:{tokenize}",
                           *options)
    cluster.wait_for(f"{tokenize}_1", "RUNNING", timeout_s=60)
    cluster.scontrol("requeue", f"{tokenize}_1")
    cluster.wait_for(merge, "COMPLETED", timeout_s=240)
    assert cluster.job(f"{tokenize}_1")["Restarts"] == "1"
    for split in ("train", "validation"):
        assert sorted(documents(tmp_path / "out", split)) == sorted(documents(tmp_path / "whole", split))
