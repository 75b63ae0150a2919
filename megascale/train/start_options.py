"""What a user asks of one start of a run, beside its config: how it travels from the command to the ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

FRESH = "--fresh"
FORK = "--fork="
ALLOW = "--allow-change="


@dataclass(frozen=True)
class StartOptions:
    """Options of `megascale train`.

    Attributes:
        is_fresh: set aside the run that the folder holds.
        fork: RUN@STEP that a new run begins with, None for step 0.
        allowed: keys whose change is allowed though it changes what is computed.
    """

    is_fresh: bool = False
    fork: str | None = None
    allowed: tuple[str, ...] = ()

    def to_arguments(self) -> list[str]:
        """As a rank's command line has them."""
        return [
            *([FRESH] if self.is_fresh else []),
            *([f"{FORK}{self.fork}"] if self.fork else []),
            *(f"{ALLOW}{key}" for key in self.allowed),
        ]

    @classmethod
    def from_arguments(cls, arguments: Sequence[str]) -> Self:
        """Reads what `to_arguments` gave; other arguments are passed over."""
        return cls(
            is_fresh=FRESH in arguments,
            fork=next((text.removeprefix(FORK) for text in arguments if text.startswith(FORK)), None),
            allowed=tuple(text.removeprefix(ALLOW) for text in arguments if text.startswith(ALLOW)),
        )
