"""Files that a command writes to its standard output: `pipe:` urls, which run only where the config allows it."""

import os
import select
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from megascale.data.location import PIPE
from megascale.data.transfer import Access, Body, TransientError

STDERR_TAIL_BYTES = 500


@contextmanager
def open_command(place: str, start: int, access: Access) -> Iterator[Body]:
    """Runs the command of a `pipe:` url by the shell, and ends it with all its children on the way out.

    It isn't opened by webdataset: that takes exit status 141 for a success, waits for a silent command for two hours,
    and follows the environment's GOPEN_REWRITE.

    Raises:
        TransientError: from `read`: the command has failed, or says nothing for too long.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            ["/bin/sh", "-c", place.removeprefix(PIPE)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, bufsize=0, start_new_session=True,
        )
        try:
            yield Body(0, None, lambda count: _read(process, count, errors, access.timeout_s))
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()


def _read(process: subprocess.Popen, count: int, errors: BinaryIO, timeout_s: float) -> bytes:
    ready, _, _ = select.select([process.stdout], [], [], timeout_s)
    if not ready:
        raise TransientError(f"the command has written nothing for {timeout_s:g} s{_tail(errors)}")
    content = process.stdout.read(count)
    if content:
        return content
    try:
        status = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        raise TransientError(f"the command has closed its output and goes on for {timeout_s:g} s") from None
    if status:
        ending = f"ended by signal {-status}" if status < 0 else f"exit status {status}"
        raise TransientError(f"the command failed, {ending}{_tail(errors)}")
    return b""


def _tail(errors: BinaryIO) -> str:
    size = os.fstat(errors.fileno()).st_size
    text = os.pread(errors.fileno(), STDERR_TAIL_BYTES, max(0, size - STDERR_TAIL_BYTES)).decode(errors="replace")
    return f"; it wrote: {text.strip()}" if text.strip() else ""
