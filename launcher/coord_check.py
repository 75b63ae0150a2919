"""`megascale coord-check`: whether activations keep their size over widths, measured by a process that has torch."""

from collections.abc import Sequence
from pathlib import Path

from launcher.request import run_request
from megascale.errors import ConfigError

COORD_CHECK_MODULE = "megascale.train.coord_check"


def check_coordinates(
    config_path: Path, overrides: Sequence[str], widths_text: str, num_steps: int, plot: Path | None
) -> None:
    """Prints the sizes of activations over widths, without and with muP.

    Raises:
        ConfigError: widths that aren't numbers.
        RankFailedError: the measuring process failed, for the reason in its message.
    """
    try:
        widths = [int(width) for width in widths_text.split(",")]
    except ValueError:
        raise ConfigError(f"--widths {widths_text}: write whole numbers with commas, such as 64,128,256") from None
    run_request(COORD_CHECK_MODULE, {
        "config": str(config_path), "overrides": list(overrides), "widths": widths, "steps": num_steps,
        "plot": str(plot) if plot else None,
    })
