"""The root of a run's config: one object, frozen, that says everything about a run."""

from pydantic import Field

from megascale.config.base import Section
from megascale.config.checkpoint import CheckpointConfig
from megascale.config.data import DataConfig
from megascale.config.families import ObjectiveKind
from megascale.config.model import ModelConfig
from megascale.config.observe import ObserveConfig
from megascale.config.optimizer import OptimizerConfig
from megascale.config.training import (
    EvaluateConfig,
    ParallelConfig,
    PrecisionConfig,
    TrainConfig,
)


class RunSection(Section):
    """Which run this is and where it lives."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run in logs and W&B: letters, digits, `.`, `_` and `-`."""

    folder: str = Field(min_length=1)
    """Run folder: config, checkpoints, metrics, report. One run owns it."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the initial weights, the row order and dropout. Everything random is a function of it and the step."""


class RunConfig(Section):
    """A whole run, as one YAML file describes it."""

    run: RunSection
    """Name, folder and seed."""

    model: ModelConfig
    """Family and shape of the transformer."""

    data: DataConfig
    """What is read, in which order."""

    train: TrainConfig
    """Batch, length and step."""

    optimizer: OptimizerConfig
    """The optimizer and the learning-rate schedule."""

    precision: PrecisionConfig = PrecisionConfig()
    """Number formats."""

    parallel: ParallelConfig = ParallelConfig()
    """Layout over ranks."""

    evaluate: EvaluateConfig
    """Validation passes."""

    checkpoint: CheckpointConfig
    """When state is saved and how much of it is kept."""

    observe: ObserveConfig = ObserveConfig()
    """What is logged, and where."""

    @property
    def objective_kind(self) -> ObjectiveKind:
        """`data.objective.kind`, resolved."""
        return self.data.objective.kind or self.model.traits.objectives[0]
