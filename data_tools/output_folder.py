"""A folder that appears whole or not at all: made under another name, renamed when finished."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_tools.write_shards import fsync_folder
from megascale.errors import DataError


@contextmanager
def partial_folder(out: Path, kept: str) -> Iterator[Path]:
    """Gives a folder beside `out` to build in, with what an earlier build of `out` left there.

    If the body fails, the folder stays when a file in it matches the glob `kept`, work that the next build needn't do
    again. The folder is locked, so that two builds of one folder don't mix.

    Raises:
        DataError: another build of `out` runs, or the disk refuses a write.
    """
    partial = out.parent / f".{out.name}.partial"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        handle = os.open(partial, os.O_RDONLY)
        try:
            lock_folder(handle, out)
            try:
                yield partial
            except BaseException:
                if not any(partial.glob(kept)):
                    shutil.rmtree(partial, ignore_errors=True)
                raise
        finally:
            os.close(handle)
    except OSError as error:
        raise DataError(
            f"corpus {out} can't be written ({error}); mend that and give the command again, which goes on where this "
            "one ended, or choose another --out"
        ) from error


def lock_folder(handle: int, out: Path) -> None:
    """Takes a folder for this process; the system frees it however the process ends."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"another build of {out} is running; wait for it or choose another --out") from None


def clear_folder(folder: Path) -> None:
    """Removes everything in a folder."""
    for child in folder.iterdir():
        if child.is_dir():
            shutil.rmtree(child)
        else:
            child.unlink()


def check_replaceable(out: Path, *markers: str) -> None:
    """Refuses a place that holds anything but an empty folder or a folder with one of `markers` in it."""
    is_known = any((out / marker).exists() for marker in markers)
    if out.exists() and not is_known and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"{out} exists and isn't a corpus (no {markers[0]} in it); choose another --out")


def replace_folder(finished: Path, out: Path) -> None:
    """Gives a finished folder its name, in place of what is there."""
    old = out.parent / f".{out.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    finished.rename(out)
    fsync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)
