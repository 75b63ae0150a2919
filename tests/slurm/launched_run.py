"""A tiny run launched on the virtual cluster, and what it must end as."""

import json
import time
from pathlib import Path

import yaml

from launcher.supervise.records import AttemptRecord, read_attempts, read_node_faults
from tests.slurm.cluster import SlurmCluster
from tests.support.tiny_run import TINY_CONFIG, curve, megascale

NUM_STEPS = 60
SAVED_EVERY = 20
LIFE_S = 240.0
"""Longest wait for a job: a busy machine takes a minute to start four ranks."""


class LaunchedRun:
    """`megascale launch slurm` of 60 steps on 2 nodes, saved every 20 steps.

    Args:
        folder: for config, cluster file and run folder.
        corpus: of `make_corpus`.
        ranks_per_node: one, or where it matters two: each costs seconds of imports a start.
    """

    def __init__(self, cluster: SlurmCluster, folder: Path, corpus: Path, ranks_per_node: int = 1) -> None:
        self.cluster = cluster
        self.config = write_config(folder, corpus)
        self.folder = folder / "run"
        self.cluster_file = folder / "virtual.yaml"
        self.cluster_file.write_text(yaml.safe_dump({
            "name": "virtual", "ranks_per_node": ranks_per_node, "cpus_per_node": 2, "is_exclusive": False,
            "gpu_request": "none", "grace_s": 20,
        }))

    def launch(self, *options: str) -> str:
        """Submits the run; returns the job's id."""
        environment = {name: self.cluster.env[name] for name in ("SLURM_CONF", "PATH")}
        done = megascale("launch", "slurm", self.config, "--nodes", "2", "--cluster", self.cluster_file, *options,
                         **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("submitted job ")]
        return line.split()[2].rstrip(",")

    def wait_for_step(self, step: int) -> None:
        """Waits until the run has taken a step."""
        self._wait(lambda: self.step >= step, f"step {step}")

    def wait_for(self, job_id: str, *states: str, restarts: int = 0) -> dict[str, str]:
        """As `SlurmCluster.wait_for`, showing the run's own logs when it fails."""
        fields: dict[str, str] = {}

        def is_there() -> bool:
            fields.update(self.cluster.job(job_id))
            assert fields["JobState"] in states or fields["JobState"] not in ("FAILED", "COMPLETED", "CANCELLED"), (
                f"{fields['JobState']}, exit code {fields['ExitCode']}\n{self.text()}")
            return fields["JobState"] in states and int(fields["Restarts"]) >= restarts

        self._wait(is_there, f"job {job_id} {states}, restarts {restarts}", fields)
        return fields

    @property
    def step(self) -> int:
        """Last step in the run's metrics."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=-1)

    @property
    def attempts(self) -> list[AttemptRecord]:
        """Attempts that have ended."""
        return read_attempts(self.folder)

    @property
    def faulty_nodes(self) -> dict[str, str]:
        """Nodes with faults on record: name -> last reason."""
        return {fault.node: fault.reason for fault in read_node_faults(self.folder)}

    def text(self) -> str:
        """The end of each of the run's logs."""
        logs = sorted((self.folder / "logs").rglob("*.*"), key=lambda path: path.stat().st_mtime)
        logs = [path for path in logs if path.suffix in (".log", ".txt", ".md", ".json")]
        return "\n".join(f"--- {path}\n{path.read_text(errors='replace')[-3000:]}" for path in logs)

    def assert_ended_as(self, reference: Path) -> None:
        """Metrics and last checkpoint are the uninterrupted run's to the bit, and each token was read once."""
        assert curve(self.folder) == curve(reference)
        name = f"checkpoints/step_{NUM_STEPS:08d}"
        files = sorted((reference / name).glob("*.safetensors"))
        assert len(files) > 1
        for path in files:
            assert (self.folder / name / path.name).read_bytes() == path.read_bytes(), path.name
        audited = megascale("data", "audit", self.folder, "--tokens")
        assert audited.returncode == 0, audited.stdout + audited.stderr

    def _wait(self, condition, what: str, seen: dict[str, str] | None = None) -> None:
        deadline_s = time.monotonic() + LIFE_S
        while not condition():
            assert time.monotonic() < deadline_s, f"not within {LIFE_S} s: {what}\n{seen or ''}\n{self.text()}"
            time.sleep(0.05)


def write_config(folder: Path, corpus: Path) -> Path:
    """Writes the config of a run `folder/run`."""
    config = yaml.safe_load(TINY_CONFIG.format(run_folder=folder / "run", corpus=corpus))
    config["train"] |= {"global_batch_tokens": 1024, "micro_batch_size": 4, "max_steps": NUM_STEPS}
    config["checkpoint"]["interval_steps"] = config["evaluate"]["interval_steps"] = SAVED_EVERY
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
