"""A disk of its own in a file, and its power cut: what wasn't synced is gone.

ext4's shutdown without a log flush (`EXT4_IOC_SHUTDOWN`, EXT4_GOING_FLAGS_NOLOGFLUSH in linux/fs/ext4/ext4.h) stops all
writing at once, as a power cut does; mounting again plays back what had reached the journal.
"""

import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXT4_IOC_SHUTDOWN = 0x8004587D
NO_LOG_FLUSH = 2
DISK_BYTES = 16 << 20


class NoLoopDiskError(Exception):
    """This machine, or this user, has no such disks; says why."""


def make_disk(image: Path) -> None:
    """Makes an empty ext4 disk.

    Raises:
        NoLoopDiskError: there is no mkfs.ext4.
    """
    if shutil.which("mkfs.ext4", path=f"{os.environ['PATH']}:/sbin:/usr/sbin") is None:
        raise NoLoopDiskError("mkfs.ext4 is not installed")
    image.write_bytes(b"")
    os.truncate(image, DISK_BYTES)
    _run("mkfs.ext4", "-q", "-F", str(image))


@contextmanager
def mounted(image: Path, folder: Path) -> Iterator["Disk"]:
    """Mounts a disk on a new folder; raises NoLoopDiskError where that isn't allowed."""
    folder.mkdir()
    _run("mount", "-t", "ext4", "-o", "loop", str(image), str(folder))
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield Disk(descriptor)
    finally:
        os.close(descriptor)
        _run("umount", str(folder))
        folder.rmdir()


class Disk:
    """A mounted disk."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor

    def cut_power(self) -> None:
        """All later calls fail with EIO; what wasn't synced is lost."""
        fcntl.ioctl(self._descriptor, EXT4_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))


def _run(*command: str) -> None:
    path = f"{os.environ['PATH']}:/sbin:/usr/sbin"
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": path})
    if result.returncode:
        raise NoLoopDiskError(f"{' '.join(command)}: {result.stderr.strip()}")
