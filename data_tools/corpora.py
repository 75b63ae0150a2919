"""The files of a source, in an order that depends on names only, and how they are cut into pieces of work."""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megascale.errors import DataError

PYTHON_STDLIB = "python-stdlib"
"""A source that every machine has: the standard library of the Python that runs."""
TEXT_SUFFIXES = (
    ".txt", ".txt.gz", ".txt.zst", ".md", ".rst", ".py", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".tar",
)
"""Files read from a folder when no pattern is given."""
INSTALLED_FOLDERS = frozenset({"site-packages", "dist-packages"})
"""Folders within a standard library that hold other people's packages."""


@dataclass(frozen=True)
class Source:
    """The files of a corpus, sorted by name.

    Attributes:
        root: what names are relative to.
        files: the files, at least one.
        text_field: field of a JSON line or of a tar's .json members, column of a parquet file.
        separator: what separates documents within a text file; a file is one document without it.
        target_field: field of a JSON line that has the second text of a pair; None where a document is one text.
    """

    root: Path
    files: tuple[Path, ...]
    text_field: str = "text"
    separator: str | None = None
    target_field: str | None = None

    def name(self, path: Path) -> str:
        """A file's name within the source."""
        return path.relative_to(self.root).as_posix()

    @property
    def num_bytes(self) -> int:
        """Size of the files, the unit of progress."""
        return sum(file_stat(path).st_size for path in self.files)

    @property
    def fingerprint(self) -> str:
        """Names the files as they are: equal while no file is added, removed or written to."""
        pair = "" if self.target_field is None else f" {self.target_field!r}"
        digest = hashlib.sha256(f"{self.text_field!r} {self.separator!r}{pair}\n".encode())
        for path in self.files:
            stat = file_stat(path)
            digest.update(f"{self.name(path)!r} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()


class Piece(NamedTuple):
    """Some of a file: the lines that begin at bytes [start, stop), or all of it where these are its size."""

    path: Path
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


def python_stdlib_folder() -> Path:
    """The folder that holds the source of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def find_source(
    source: str, patterns: tuple[str, ...] = (), text_field: str = "text", separator: str | None = None
) -> Source:
    """Finds the files of a source.

    Args:
        source: a folder, a file, or the word `python-stdlib`.
        patterns: globs relative to the folder, such as `**/*.py`; by default the files with a text suffix.
        text_field: field of a JSON line, column of a parquet file.
        separator: what separates documents within a text file.

    Raises:
        DataError: no such source, or no file in it matches.
    """
    is_stdlib = source == PYTHON_STDLIB
    root = python_stdlib_folder() if is_stdlib else Path(source)
    if root.is_file():
        return Source(root.parent, (root,), text_field, separator)
    if not root.is_dir():
        raise DataError(f"source {source!r} is neither a file, a folder nor the word {PYTHON_STDLIB}")
    patterns = patterns or (("**/*.py",) if is_stdlib else tuple(f"**/*{suffix}" for suffix in TEXT_SUFFIXES))
    found = {path for pattern in patterns for path in root.glob(pattern) if not path.is_dir()}
    if is_stdlib:
        found = {path for path in found if not INSTALLED_FOLDERS & set(path.relative_to(root).parts)}
    if not found:
        raise DataError(f"source {source!r} has no file that matches {', '.join(patterns)}; choose one by --pattern")
    files = sorted(found, key=lambda path: path.relative_to(root).as_posix())
    return Source(root, tuple(files), text_field, separator)


def cut_source(source: Source, chunk_bytes: int) -> list[tuple[Piece, ...]]:
    """Cuts a source into chunks of about equal size, in its order: small files together, long JSON lines apart.

    A compressed file, a text file, a tar or a parquet file stays whole, so it is read by one process.
    """
    chunks, pieces, size = [], [], 0
    for piece in _cut_files(source, chunk_bytes):
        pieces.append(piece)
        size += piece.num_bytes
        if size >= chunk_bytes:
            chunks.append(tuple(pieces))
            pieces, size = [], 0
    return [*chunks, tuple(pieces)] if pieces else chunks


def _cut_files(source: Source, chunk_bytes: int) -> Iterator[Piece]:
    for path in source.files:
        size = file_stat(path).st_size
        step = chunk_bytes if path.suffix == ".jsonl" else max(1, size)
        for start in range(0, max(1, size), step):
            yield Piece(path, start, min(start + step, size))


def file_stat(path: Path):
    """Size and time of a file of the source."""
    try:
        return path.stat()
    except OSError as error:
        raise DataError(f"{path} can't be read ({error.strerror}); remove it from the source") from None
