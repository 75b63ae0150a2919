"""Where checkpoints lie in a run folder, and how they come and go.

    checkpoints/step_00000120            a committed checkpoint
    checkpoints/step_00000120.tmp-<n>    one being written, or left behind by a killed save
    checkpoints/step_00000080.trash      one being deleted, or left behind by a killed deletion
    quarantine/step_00000120             one that was found damaged, with a reason.txt
    set_aside/<n>/                       both folders of earlier starts, after a start with --fresh
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from megascale.checkpoint.files import move_durably

CHECKPOINTS = "checkpoints"
QUARANTINE = "quarantine"
SET_ASIDE = "set_aside"
REASON_NAME = "reason.txt"

_COMMITTED = re.compile(r"step_([0-9]{8,18})")
_LEFTOVER = re.compile(r"step_[0-9]{8,18}\.(tmp-[0-9a-z]+|trash)")


def step_name(step: int) -> str:
    """Name of the folder of a step's checkpoint."""
    return f"step_{step:08d}"


def checkpoint_path(run_folder: Path, step: int) -> Path:
    """The folder of the checkpoint that was taken after `step` steps."""
    return run_folder / CHECKPOINTS / step_name(step)


def temporary_path(run_folder: Path, step: int, token: str) -> Path:
    """Where a checkpoint is written before it is committed; the token keeps two attempts apart."""
    final = checkpoint_path(run_folder, step)
    return final.with_name(f"{final.name}.tmp-{token}")


def list_steps(run_folder: Path) -> list[int]:
    """Steps of the committed checkpoints, ascending; whether they are whole is not looked at."""
    matches = (_COMMITTED.fullmatch(name) for name in list_names(run_folder / CHECKPOINTS))
    return sorted(int(match[1]) for match in matches if match and match[0] == step_name(int(match[1])))


def is_leftover(name: str) -> bool:
    """Whether a name in `checkpoints` is of a save or a deletion that may have been killed."""
    return _LEFTOVER.fullmatch(name) is not None


def set_aside(run_folder: Path, other_names: Sequence[str] = ()) -> Path | None:
    """Moves a run's checkpoints and other files away, for a start that was asked to be fresh; nothing is deleted.

    Args:
        other_names: files and folders that go with the checkpoints; those that aren't there are passed over.

    Returns:
        Where they are now, or None when there was nothing.
    """
    sources = [run_folder / name for name in (CHECKPOINTS, QUARANTINE) if list_names(run_folder / name)]
    sources += [run_folder / name for name in other_names if (run_folder / name).exists()]
    if not sources:
        return None
    target = free_name(run_folder / SET_ASIDE / "1")
    target.mkdir(parents=True)
    for source in sources:
        move_durably(source, target / source.name)
    return target


def list_names(folder: Path) -> list[str]:
    """The names in a folder; none where there is no such folder."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def free_name(path: Path) -> Path:
    """The path itself, or with the first number that makes it new."""
    candidates = (path if number == 1 else path.with_name(f"{path.name}.{number}") for number in range(1, 1_000_000))
    return next(candidate for candidate in candidates if not os.path.lexists(candidate))
