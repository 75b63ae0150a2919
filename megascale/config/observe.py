"""What a run reports about itself, and where to."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from megascale.config.base import Section


class WandbConfig(Section):
    """Weights & Biases. The API key is never part of a config: it comes from WANDB_API_KEY or `wandb login`."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Where the metrics go: `online` sends them, `offline` keeps files for `wandb sync`, `disabled` does nothing.
    `auto`, the default, is online when an API key is configured and offline otherwise: a first run needs no account."""

    project: str = Field(default="megascale", min_length=1)
    """Name of the W&B project; one project for all runs by default, since runs are compared within a project."""

    entity: str | None = None
    """W&B user or team that owns the project; null, the default, takes the default entity of the API key."""

    tags: tuple[str, ...] = Field(default=(), strict=False)
    """Labels to find the run by in W&B; none by default."""


class ObserveConfig(Section):
    """What is logged, how often, and to where."""

    log_interval_steps: PositiveInt = 1
    """Steps from one logged line to the next; 1, the default, since a line costs well under a millisecond."""

    peak_flops_per_device: PositiveFloat | None = None
    """Dense peak of one device in FLOP/s, to compute MFU with; null, the default, looks the device up in
    `megascale/observe/peaks.py` and leaves MFU out when it isn't there. Set it for other devices or precisions."""

    wandb: WandbConfig = WandbConfig()
    """Weights & Biases; its defaults work without an account and without a network."""
