"""The config section of checkpoints: how often state is saved, how much of it is kept, what a failed save does."""

import re
from typing import Literal

from pydantic import Field, field_validator

from megascale.config.base import Section
from megascale.errors import redact

OBJECT_SCHEMES = ("s3", "gs", "az")
OBJECT_URL = re.compile(
    rf"({'|'.join(OBJECT_SCHEMES)})://[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9_+=-][A-Za-z0-9._+=-]*)*/?"
)
"""What checkpoints can be written to besides folders; no password, query or pattern."""


def object_url_problem(url: str) -> str | None:
    """Why checkpoints can't be written to a url, None where they can."""
    if OBJECT_URL.fullmatch(url):
        return None
    known = ", ".join(f"{scheme}://" for scheme in OBJECT_SCHEMES)
    return (
        f"{url}: checkpoints can't go there; write BUCKET/FOLDER after one of {known}, in letters, digits and ._+=-"
        " without a password: credentials come from the environment, as the store's own tools read them"
    )


class CheckpointConfig(Section):
    """When state is saved and how much of it is kept."""

    interval_steps: int = Field(ge=1)
    """Steps between two checkpoints: a hard kill loses at most this many steps, a signal none. There is one more at
    the end of the run and whenever the run is asked to stop."""

    keep_last: int = Field(2, ge=1)
    """Newest checkpoints to keep; older ones are deleted once the newest is safely on disk. Two, so that there is one
    to fall back to when the newest turns out damaged. The disk needs room for one more than this."""

    keep_every_steps: int = Field(0, ge=0)
    """Checkpoints whose step is a multiple of this are kept for ever, to fork from or to compare later. 0: none; a
    multiple of `interval_steps`, or few will be there."""

    keep_best: int = Field(0, ge=0)
    """So many checkpoints with the lowest validation loss are kept besides. Only those count that were taken at a step
    that was evaluated."""

    asynchronous: bool = True
    """Whether training goes on while a checkpoint is written: it waits only while the state is copied to memory that a
    process beside each rank writes from. Costs as much host memory as the rank's share of the optimizer state, 12 bytes
    a parameter over all ranks. Off, or on a system without files in memory, training waits for the disk."""

    read_back: bool = True
    """Whether each file is read again and compared before the checkpoint counts, which finds disks and networks that
    lose data silently. Beside training when `asynchronous`."""

    probe: bool = True
    """Whether a checkpoint holds a batch and its loss, which the run that loads it must reproduce before its first
    step, in any layout. Costs a forward pass of one micro-batch a save."""

    url: str | None = None
    """An object store to save to, such as `s3://bucket/runs`; each run has a folder of its own in it, named by its id.
    Empty, the default: `checkpoints/` of the run folder."""

    @field_validator("url")
    @classmethod
    def check_url(cls, url: str | None) -> str | None:
        """Refuses what checkpoints can't be written to, and what would put a password into every checkpoint."""
        if url is not None and (problem := object_url_problem(url)):
            raise ValueError(f"checkpoint.url = {redact(problem)}")
        return url

    grace_s: float = Field(0, ge=0)
    """Longest time from a request to stop to the end of its save, in seconds: what takes longer is given up, and the
    checkpoint before counts. 0, the default: as long as it takes, or as the scheduler waits."""

    on_save_error: Literal["continue", "stop"] = "continue"
    """What a save that fails does, for instance on a full disk: `continue` trains on and tries again at the next
    interval, `stop` ends the run. The earlier checkpoints stay as they were in both cases."""
