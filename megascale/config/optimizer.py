"""The optimizer: which one, its constants, its learning rate over the run, and averages of the weights."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megascale.config.base import Section

OptimizerKind = Literal["adamw", "adafactor", "lion", "muon"]
WHOLE_KINDS = ("adafactor", "muon")
"""Optimizers whose update of an element depends on the whole matrix that it is in."""


class ParameterGroupConfig(Section):
    """Parameters that are updated with constants of their own."""

    match: str = Field(min_length=1)
    """`fnmatch` pattern of global parameter names, such as `embedding.*`; the first group that fits counts."""

    lr_factor: float = Field(1.0, ge=0)
    """Factor of the learning rate; 0 leaves the parameters as they began."""

    weight_decay: float | None = Field(None, ge=0)
    """In place of `optimizer.weight_decay`. Empty: that, for matrices, and none for norms and biases."""


class OptimizerConfig(Section):
    """The optimizer and its learning-rate schedule."""

    kind: OptimizerKind = "adamw"
    """`adamw` (Loshchilov and Hutter 2019), the default: most is known of it. `lion`: the sign of a momentum, half the
    state (Chen et al. 2023, arXiv 2302.06675). `adafactor`: second moments as a row times a column, next to no state
    (Shazeer and Stern 2018, arXiv 1804.04235). `muon`: hidden matrices by an orthogonalised momentum, the rest by AdamW
    (Jordan 2024; Liu et al. 2025, arXiv 2502.16982). The last two need whole gradients: zero_stage 0 or 1."""

    learning_rate: float = Field(gt=0)
    """Peak learning rate, reached at the end of the warm-up. Of adafactor: relative to the size of a parameter."""

    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """Shape after the warm-up: `wsd` (warm-up, stable, decay) stays at the peak and falls over the last
    `decay_fraction` of the run (MiniCPM, arXiv 2404.06395, section 4)."""

    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises linearly to the peak."""

    horizon_steps: int | None = Field(None, ge=1)
    """Step at which the schedule ends; train.max_steps when not given. Give it to make a run longer later without
    changing the part already trained."""

    min_fraction: float = Field(0.1, ge=0, le=1)
    """Final learning rate as a fraction of the peak (0.1: Chinchilla, arXiv 2203.15556, appendix B)."""

    decay_fraction: float = Field(0.2, gt=0, le=1)
    """Part of the horizon over which `wsd` decays."""

    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment; of lion: weight of the momentum in an update."""

    beta2: float = Field(0.95, ge=0, lt=1)
    """Decay of the second moment (0.95: GPT-3, arXiv 2005.14165, appendix B); of lion: decay of the momentum, where
    Chen et al. take 0.99. Of no use to adafactor, whose decay follows from the step."""

    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment (adamw, and what muon leaves to it)."""

    momentum: float = Field(0.95, ge=0, lt=1)
    """Decay of muon's momentum; 0.95 as in both papers."""

    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay of matrices; norms and biases have none (0.1: GPT-3, arXiv 2005.14165, appendix B)."""

    clip_norm: float = Field(1.0, ge=0)
    """Largest L2 norm of the whole gradient; larger ones are scaled down to it. 0 turns clipping off."""

    groups: Annotated[tuple[ParameterGroupConfig, ...], Field(strict=False)] = ()
    """Parameters with a learning rate or a weight decay of their own. Empty, the default: none."""

    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights, kept in fp32 beside them: after each update it moves
    1 - ema_decay of the way to them. Empty, the default: no average."""

    validate_ema: bool = False
    """Whether each validation pass also gives the averaged weights' loss; it takes a second pass."""

    @model_validator(mode="after")
    def check_average(self) -> Self:
        """Refuses to evaluate an average that isn't kept."""
        if self.validate_ema and self.ema_decay is None:
            raise ValueError(
                "optimizer.validate_ema = true has no average to validate; set optimizer.ema_decay, such as 0.999"
            )
        return self
