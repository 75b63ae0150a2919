"""Where checkpoints lie in a run folder, and how they come and go.

    checkpoints/step_00000120            a committed checkpoint
    checkpoints/step_00000120.tmp-<n>    one being written, or left behind by a killed save
    checkpoints/step_00000080.trash      one being deleted, or left behind by a killed deletion
    quarantine/step_00000120             one that was found damaged, with a reason.txt
    set_aside/<n>/                       both folders of earlier starts, after a start with --fresh
"""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from megascale.checkpoint.files import move_durably, write_durably

CHECKPOINTS = "checkpoints"
QUARANTINE = "quarantine"
SET_ASIDE = "set_aside"
REASON_NAME = "reason.txt"

_COMMITTED = re.compile(r"step_([0-9]{8,18})")
_LEFTOVER = re.compile(r"step_[0-9]{8,18}\.(tmp-[0-9]+|trash)")


def step_name(step: int) -> str:
    """Name of the folder of a step's checkpoint."""
    return f"step_{step:08d}"


def checkpoint_path(run_folder: Path, step: int) -> Path:
    """The folder of the checkpoint that was taken after `step` steps."""
    return run_folder / CHECKPOINTS / step_name(step)


def temporary_path(run_folder: Path, step: int, token: int) -> Path:
    """Where a checkpoint is written before it is committed; the token keeps two attempts apart."""
    final = checkpoint_path(run_folder, step)
    return final.with_name(f"{final.name}.tmp-{token}")


def list_steps(run_folder: Path) -> list[int]:
    """Steps of the committed checkpoints, ascending; whether they are whole is not looked at."""
    matches = (_COMMITTED.fullmatch(name) for name in _names(run_folder / CHECKPOINTS))
    return sorted(int(match[1]) for match in matches if match and match[0] == step_name(int(match[1])))


def has_quarantine(run_folder: Path) -> bool:
    """Whether a checkpoint of this run was ever found damaged."""
    return bool(_names(run_folder / QUARANTINE))


def remove_leftovers(run_folder: Path) -> None:
    """Removes what killed saves and deletions left behind. Only the job that owns the run folder may call this.

    What can't be removed stays: its name is random or a `.trash`, and collides with nothing.
    """
    folder = run_folder / CHECKPOINTS
    for name in _names(folder):
        if _LEFTOVER.fullmatch(name):
            shutil.rmtree(folder / name, ignore_errors=True)


def delete_older(run_folder: Path, newest_step: int, keep_last: int) -> None:
    """Deletes checkpoints older than the newest, which is known to be on disk, so that `keep_last` remain.

    Each is renamed first, so that a half-deleted one never passes for a checkpoint. One that can't be deleted, as on
    NFS while somebody reads it, is left to the next save: the save that was made is whole.
    """
    older = [step for step in list_steps(run_folder) if step < newest_step]
    for step in older[: max(0, len(older) - (keep_last - 1))]:
        path = checkpoint_path(run_folder, step)
        trash = path.with_name(f"{path.name}.trash")
        move_durably(path, trash)
        shutil.rmtree(trash, ignore_errors=True)


def quarantine_checkpoint(run_folder: Path, step: int, reason: str) -> Path:
    """Moves a damaged checkpoint out of the way, leaves the reason beside its files, and returns its new place."""
    path = checkpoint_path(run_folder, step)
    target = _free_name(run_folder / QUARANTINE / path.name)
    target.parent.mkdir(exist_ok=True)
    move_durably(path, target)
    if target.is_dir():
        write_durably(_free_name(target / REASON_NAME), [f"{reason}\n".encode()])
    return target


def set_aside(run_folder: Path, other_names: Sequence[str] = ()) -> Path | None:
    """Moves a run's checkpoints and other files away, for a start that was asked to be fresh; nothing is deleted.

    Args:
        other_names: files and folders that go with the checkpoints; those that aren't there are passed over.

    Returns:
        Where they are now, or None when there was nothing.
    """
    sources = [run_folder / name for name in (CHECKPOINTS, QUARANTINE) if _names(run_folder / name)]
    sources += [run_folder / name for name in other_names if (run_folder / name).exists()]
    if not sources:
        return None
    target = _free_name(run_folder / SET_ASIDE / "1")
    target.mkdir(parents=True)
    for source in sources:
        move_durably(source, target / source.name)
    return target


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _free_name(path: Path) -> Path:
    """The path itself, or with the first number that makes it new."""
    candidates = (path if number == 1 else path.with_name(f"{path.name}.{number}") for number in range(1, 1_000_000))
    return next(candidate for candidate in candidates if not os.path.lexists(candidate))
