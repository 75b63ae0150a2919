"""Files of text that may be compressed, read as a stream: bounded in memory, and never shorter than they are."""

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megascale.errors import DataError

GZIP, ZSTD = ".gz", ".zst"
COMPRESSED_SUFFIXES = (GZIP, ZSTD)
ZSTD_INPUT_BYTES = 1 << 11
"""Compressed bytes taken at a time: the format allows them to become 64 MiB at most."""


def inner_suffix(path: Path) -> str:
    """The suffix of a file's name without that of its compression: `.jsonl` for `a.jsonl.gz`."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED_SUFFIXES else path.suffix


@contextmanager
def open_content(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Opens a file and gives its content, decompressed, and the raw file, whose position tells the progress.

    Raises:
        DataError: the body met compressed bytes that are cut short or damaged, or zstandard isn't installed.
    """
    with path.open("rb") as raw:
        try:
            if path.suffix in COMPRESSED_SUFFIXES and os.fstat(raw.fileno()).st_size == 0:
                raise EOFError  # gzip's reader takes it for an empty text
            if path.suffix == GZIP:
                with gzip.GzipFile(fileobj=raw) as content:
                    yield content, raw
            elif path.suffix == ZSTD:
                yield io.BufferedReader(ZstdFile(raw, path), 1 << 16), raw
            else:
                yield raw, raw
        except EOFError:
            raise DataError(f"{path} is cut short: its compressed data has no end; restore it") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path} can't be decompressed ({error}); restore it") from None


class ZstdFile(io.RawIOBase):
    """The content of a zstd file of one or more frames. A frame without its end is an error, as in gzip's reader."""

    def __init__(self, raw: BinaryIO, path: Path):
        try:
            import zstandard
        except ImportError:
            raise DataError(f"{path} needs zstandard; install it with: pip install 'megascale[zst]'") from None
        self._raw, self._path, self._new_frame = raw, path, zstandard.ZstdDecompressor().decompressobj
        self._error, self._frame, self._ready = zstandard.ZstdError, None, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:
        while not self._ready:
            content = (self._frame and self._frame.unused_data) or self._raw.read(ZSTD_INPUT_BYTES)
            if not content:
                if self._frame and not self._frame.eof:
                    raise EOFError
                return 0
            if not self._frame or self._frame.eof:
                self._frame = self._new_frame()
            try:
                self._ready = memoryview(self._frame.decompress(content))
            except self._error as error:
                raise DataError(f"{self._path} can't be decompressed ({error}); restore it") from None
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size
