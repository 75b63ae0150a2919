"""What a cluster is, in a file of its own (`configs/cluster/*.yaml`): the same run goes to any of them unchanged."""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, field_validator

from megascale.config.base import Section
from megascale.config.load import explain_problem, read_yaml
from megascale.errors import ConfigError

SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSW|CREDENTIAL)", re.I)
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class ContainerConfig(Section):
    """The container that ranks run in; scheduler commands run outside of it."""

    kind: Literal["pyxis", "apptainer"]
    """Pyxis adds options to srun; Apptainer is a command before ours."""

    image: str = Field(min_length=1)
    """Image, in the words of the tool: a path, or an address of a registry without a password."""

    mounts: tuple[str, ...] = Field(default=(), strict=False)
    """Folders to mount besides the run folder, as `SOURCE:TARGET`."""


class LimitsConfig(Section):
    """How long a rank may stay in one phase without progress before the run counts as hung."""

    step_floor_s: PositiveFloat = 10.0
    """Least limit of a step, in seconds: shorter silences are noise."""

    step_factor: PositiveFloat = 5.0
    """A step may take so many times the slowest one so far (the first of a session left out)."""

    first_step_s: PositiveFloat = 900.0
    """Limit of a session's first two steps, in seconds: compilation and warm-up."""

    start_s: PositiveFloat = 600.0
    """Limit from the start of a rank to its meeting with the others, in seconds: a cold file system imports slowly."""

    load_s: PositiveFloat = 1800.0
    """Limit of building the model and loading a checkpoint, in seconds."""

    data_s: PositiveFloat = 600.0
    """Limit of a wait for data, in seconds: stores are retried within it."""

    save_s: PositiveFloat = 1800.0
    """Limit of a wait for a save, in seconds."""

    evaluate_s: PositiveFloat = 300.0
    """Limit of one batch of an evaluation, in seconds."""

    close_s: PositiveFloat = 120.0
    """Limit of the end of a run, in seconds: logs are sent off."""

    frozen_s: PositiveFloat = 5.0
    """A rank whose process is stopped (state T) for so many seconds is hung in whatever phase."""

    node_s: PositiveFloat = 8.0
    """A node whose agent says nothing for so many seconds is lost, and its ranks end themselves."""


class PreflightConfig(Section):
    """What every node must show before ranks start on it."""

    is_enabled: bool = True
    """Whether nodes are checked at all."""

    limit_s: PositiveFloat = 30.0
    """A node that has not answered after so many seconds is bad."""

    min_memory_gib: float = Field(1.0, ge=0)
    """Least memory available on a node, in GiB."""

    min_disk_gib: float = Field(1.0, ge=0)
    """Least space free where the run folder and the temporary folder lie, in GiB."""

    min_shm_gib: float = Field(0.25, ge=0)
    """Least space free in /dev/shm, in GiB: asynchronous saves and NCCL use it."""

    max_clock_skew_s: PositiveFloat = 5.0
    """Largest difference of a node's clock from the median of all, in seconds; of two nodes, from the first one's."""

    min_bandwidth_gbps: float = Field(0.05, ge=0)
    """Least bandwidth between two nodes over TCP, in gigabits per second. The default only finds broken links."""

    min_open_files: PositiveInt = 1024
    """Least limit of open files of a process."""


class ClusterConfig(Section):
    """Facts of one cluster."""

    name: str = Field("local", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the cluster, for messages."""

    gpus_per_node: int = Field(0, ge=0)
    """GPUs of a node; 0 trains on the CPU."""

    ranks_per_node: PositiveInt | None = None
    """Ranks on a node; null, the default, is one per GPU, and must be given where there are none."""

    cpus_per_node: PositiveInt | None = None
    """Cores to ask for on a node; null leaves it to the scheduler, or to `exclusive`."""

    memory_per_node: str | None = Field(default=None, pattern=r"^[0-9]+[KMGT]?$")
    """Memory to ask for on a node, such as `480G`; `0` is all of it, null leaves it to the scheduler."""

    is_exclusive: bool = True
    """Whether nodes are asked for whole."""

    partition: str | None = None
    """SLURM partition; null is the default one."""

    account: str | None = None
    """SLURM account."""

    qos: str | None = None
    """SLURM quality of service."""

    gpu_request: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """How GPUs are asked for: `--gpus-per-node=N`, `--gres=gpu:N`, or not at all where nodes come with theirs."""

    gpu_type: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_.-]+$")
    """Type of GPU in that request, where a cluster has several."""

    peak_flops_per_device: PositiveFloat | None = None
    """Dense peak of one device in FLOP/s; a time limit that is too short even at peak is refused."""

    interface: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_.@:-]+$")
    """Network interface that ranks talk over, such as `eth0`; null takes the one that reaches the first node."""

    modules: tuple[str, ...] = Field(default=(), strict=False)
    """Environment modules to load in a job."""

    setup: tuple[str, ...] = Field(default=(), strict=False)
    """Lines of bash at the head of a job, after the modules."""

    environment: dict[str, str] = Field(default_factory=dict)
    """Variables for every rank, such as NCCL's. Secrets are refused here: a job inherits them from the shell."""

    python: str | None = None
    """Python of a job; null is the one that `megascale launch` runs with."""

    container: ContainerConfig | None = None
    """Container of agents and ranks."""

    sbatch: tuple[str, ...] = Field(default=(), strict=False)
    """More options of sbatch, each a whole one such as `--constraint=ib`."""

    signal: Literal["USR1", "USR2"] = "USR1"
    """Signal that warns a job of its time limit."""

    grace_s: PositiveInt = 120
    """Seconds before the time limit at which a job is warned; SLURM may be a minute early. Saving must fit in."""

    limits: LimitsConfig = LimitsConfig()
    """When a run counts as hung."""

    preflight: PreflightConfig = PreflightConfig()
    """What nodes must show first."""

    @field_validator("environment")
    @classmethod
    def check_environment(cls, environment: dict[str, str]) -> dict[str, str]:
        """Refuses secrets, and names that no shell takes."""
        for name in environment:
            if not VARIABLE.fullmatch(name):
                raise ValueError(f"environment.{name}: not a name of a variable: letters, digits and _")
            if SECRET_NAME.search(name):
                raise ValueError(
                    f"environment.{name}: looks like a secret, and this file is copied into run folders; export it in"
                    " the shell instead, a job inherits it"
                )
        return environment

    @field_validator("setup", "sbatch", "modules")
    @classmethod
    def check_lines(cls, lines: tuple[str, ...]) -> tuple[str, ...]:
        """Refuses what would be more than one line of a script."""
        for line in lines:
            if not line.isprintable():
                raise ValueError(f"{line!r}: a line of a script, without line breaks and control characters")
        return lines

    @property
    def num_ranks_per_node(self) -> int | None:
        """Ranks of a node; None where it can't be told."""
        return self.ranks_per_node or self.gpus_per_node or None


def load_cluster(path: Path) -> ClusterConfig:
    """Reads a cluster's file.

    Raises:
        ConfigError: a file that can't be read, an unknown key, a value of the wrong type.
    """
    try:
        return ClusterConfig.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {explain_problem(problem, ClusterConfig)}"
                                    for problem in error.errors())) from None
