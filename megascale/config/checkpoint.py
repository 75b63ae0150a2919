"""The config section of checkpoints: how often state is saved, how much of it is kept, what a failed save does."""

from typing import Literal

from pydantic import Field

from megascale.config.base import Section


class CheckpointConfig(Section):
    """When state is saved and how much of it is kept."""

    interval_steps: int = Field(ge=1)
    """Steps between two checkpoints: a hard kill loses at most this many steps, a signal none. There is one more at
    the end of the run and whenever the run is asked to stop."""

    keep_last: int = Field(2, ge=1)
    """Newest checkpoints to keep; older ones are deleted once the newest is safely on disk. Two, so that there is one
    to fall back to when the newest turns out damaged. The disk needs room for one more than this."""

    on_save_error: Literal["continue", "stop"] = "continue"
    """What a save that fails does, for instance on a full disk: `continue` trains on and tries again at the next
    interval, `stop` ends the run. The earlier checkpoints stay as they were in both cases."""
