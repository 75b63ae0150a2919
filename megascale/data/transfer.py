"""What the readers of all schemes share: how often and how long to try, and the stream of bytes that each gives."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from megascale.config.data import DataConfig


@dataclass(frozen=True)
class Access:
    """How files are read that aren't local.

    Attributes:
        attempts: times that a fetch is tried.
        timeout_s: seconds without a byte after which it is tried again.
        allow_commands: whether `pipe:` urls may run their command.
        pause_s: seconds before the second attempt; every later pause is twice as long as the one before.
    """

    attempts: int = 5
    timeout_s: float = 60.0
    allow_commands: bool = False
    pause_s: float = 1.0


def access_of(data: DataConfig) -> Access:
    """What the config says about it."""
    return Access(data.fetch_attempts, data.fetch_timeout_s, data.allow_commands)


class Body(NamedTuple):
    """The bytes of a file from one of them on.

    Attributes:
        start: byte of the file at which they begin: the one asked for, or 0 where the source can't begin elsewhere.
        num_bytes: how many the source has announced, None where it announces nothing.
        read: gives up to so many bytes, none at the end.
    """

    start: int
    num_bytes: int | None
    read: Callable[[int], bytes]


class TransientError(Exception):
    """A fault of a fetch that another attempt may not meet."""


class FetchStoppedError(Exception):
    """The fetch was given up by whoever had asked for it."""
