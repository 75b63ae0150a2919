"""Bytes of a file from wherever it lies: whole, as many as expected, and of the expected hash, or an error."""

import hashlib
import io
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import Event
from typing import BinaryIO

from megascale.data.command import open_command
from megascale.data.http import open_http
from megascale.data.location import is_local, local_path, scheme_of
from megascale.data.object_store import PACKAGES, open_object
from megascale.data.transfer import Access, Body, FetchStoppedError, TransientError
from megascale.errors import ConfigError, DataError

CHUNK_BYTES = 1 << 20
"""Held in memory at a time."""
SMALL_FILE_BYTES = 1 << 28
"""Most that `read_bytes` takes from elsewhere: the table of 2.8 million shards."""

Opener = Callable[[str, int, Access], AbstractContextManager[Body]]


def read_bytes(place: str, access: Access) -> bytes:
    """The content of a small file.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: no way to read from there is known or allowed.
        DataError: it can't be read, with the place, what was tried and what was answered.
    """
    if not is_local(place):
        buffer = io.BytesIO()
        _fetch(place, buffer, None, access, Event())
        return buffer.getvalue()[: buffer.tell()]
    try:
        return local_path(place).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(place) from None
    except OSError as error:
        raise DataError(f"{place} can't be read ({error.strerror or error})") from None


def fetch_file(place: str, file: BinaryIO, expected_bytes: int, access: Access, stop: Event | None = None) -> None:
    """Writes a file of known size into `file`, from its start; goes on where a lost connection had stopped.

    Args:
        place: path or url.
        file: never written to beyond `expected_bytes`.
        expected_bytes: size of the file; no more than one byte above it is read.
        access: how to read.
        stop: ends the fetch soon after it is set.

    Raises:
        ConfigError: no way to read from there is known or allowed.
        DataError: the file is missing, of another size, or can't be read.
        FetchStoppedError: `stop` was set.
    """
    file.seek(0)
    try:
        _fetch(place, file, expected_bytes, access, stop or Event())
    except FileNotFoundError:
        raise DataError(
            f"{place} doesn't exist, and the index lists it with {expected_bytes} bytes; upload it again, or "
            "check that the url is the corpus's"
        ) from None


def fetch_verified(
    place: str, file: BinaryIO, expected_bytes: int, sha256: str, access: Access, stop: Event | None = None
) -> None:
    """Like `fetch_file`; a file of another hash is fetched again, as often as `access` says. Cost: 1 s per GB more."""
    for _ in range(access.attempts):
        fetch_file(place, file, expected_bytes, access, stop)
        file.seek(0)
        found = hashlib.file_digest(file, "sha256").hexdigest()
        if found == sha256:
            return
    raise DataError(
        f"{place}: sha256 {found[:12]}..., expected {sha256[:12]}..., fetched {access.attempts} times; the "
        "file there is damaged or was replaced: upload it again, or make the corpus's index again with: megascale data "
        "index"
    )


def _fetch(place: str, file: BinaryIO, expected_bytes: int | None, access: Access, stop: Event) -> None:
    opener, fault = _opener_of(place, access), ""
    for attempt in range(access.attempts):
        # Ranks that lost one server together don't come back to it together. Not from the generator that runs seed.
        pause_s = access.pause_s * 2 ** (attempt - 1) * random.SystemRandom().uniform(0.75, 1.25) if attempt else 0
        if stop.wait(pause_s):
            raise FetchStoppedError(place)
        try:
            return _receive(opener, place, file, expected_bytes, access, stop)
        except TransientError as error:
            fault = str(error)
    raise DataError(f"{place} can't be fetched: {fault}; tried {access.attempts} times")


def _receive(
    opener: Opener, place: str, file: BinaryIO, expected_bytes: int | None, access: Access, stop: Event
) -> None:
    """Appends to what earlier attempts have received. Raises TransientError unless the file is whole afterwards."""
    most = SMALL_FILE_BYTES if expected_bytes is None else expected_bytes
    with opener(place, file.tell(), access) as body:
        file.seek(body.start)
        while content := body.read(min(CHUNK_BYTES, most - file.tell() + 1)):
            if stop.is_set():
                raise FetchStoppedError(place)
            if file.tell() + len(content) > most:
                file.seek(0)
                raise TransientError(f"it has more than {most} bytes, the expected size: was it replaced?")
            file.write(content)
        received, announced = file.tell(), body.num_bytes and body.start + body.num_bytes
    if received < (announced or 0):
        raise TransientError(f"the connection ended after {received} of {announced} bytes")
    if expected_bytes not in (None, received):
        raise TransientError(
            f"it has {received} bytes, {expected_bytes} are expected: it was cut short, or not uploaded whole"
        )


def _opener_of(place: str, access: Access) -> Opener:
    scheme = scheme_of(place)
    openers: dict[str, Opener] = {
        "file": _open_local, "http": open_http, "https": open_http, **dict.fromkeys(PACKAGES, open_object),
        "pipe": open_command,
    }
    if scheme not in openers:
        known = ", ".join(f"{name}://" for name in openers if name not in ("file", "pipe"))
        raise ConfigError(f"{place}: nothing reads {scheme}://; use a local path, {known} or pipe:COMMAND {{}}")
    if scheme == "pipe" and not access.allow_commands:
        raise ConfigError(
            f"{place} runs a command on this machine, which a config from elsewhere must not do unasked; if "
            "you trust it, set data.allow_commands: true"
        )
    return openers[scheme]


@contextmanager
def _open_local(place: str, start: int, access: Access) -> Iterator[Body]:
    try:
        file = local_path(place).open("rb")
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(place) from None
    except OSError as error:
        raise DataError(f"{place} can't be opened ({error.strerror or error})") from None

    def read(count: int) -> bytes:
        try:
            return file.read(count)
        except OSError as error:
            raise TransientError(f"reading failed ({error.strerror or error})") from None

    with file:
        file.seek(start)
        yield Body(start, None, read)
