"""Where text comes from: folders, text files, JSON lines and parquet, read in an order that depends on names only."""

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from megascale.errors import DataError

PYTHON_STDLIB = "python-stdlib"
"""A source that every machine has: the standard library of the Python that runs."""
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl", ".parquet")
"""Files read from a folder when no pattern is given."""
INSTALLED_FOLDERS = frozenset({"site-packages", "dist-packages"})
"""Folders within a standard library that hold other people's packages."""


@dataclass(frozen=True)
class Source:
    """The files of a corpus, sorted by name.

    Attributes:
        root: what names are relative to.
        files: the files, at least one.
        text_field: field of a JSON line, column of a parquet file.
        separator: what separates documents within a text file; a file is one document without it.
    """

    root: Path
    files: tuple[Path, ...]
    text_field: str = "text"
    separator: str | None = None

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
        digest = hashlib.sha256(f"{self.text_field!r} {self.separator!r}\n".encode())
        for path in self.files:
            stat = file_stat(path)
            digest.update(f"{self.name(path)!r} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Document:
    """One text and the share of the source's bytes that it stands for."""

    text: str
    source_bytes: int


@dataclass
class ReadCounts:
    """What was met while reading.

    Attributes:
        documents: texts with more than white space in them.
        empty: the others, which are dropped.
        bad_utf8: texts with bytes that aren't UTF-8, which are replaced.
        bad_utf8_files: the first few files that hold such texts.
    """

    documents: int = 0
    empty: int = 0
    bad_utf8: int = 0
    bad_utf8_files: list[str] = field(default_factory=list)

    def note_bad_utf8(self, name: str) -> None:
        self.bad_utf8 += 1
        if len(self.bad_utf8_files) < 3 and name not in self.bad_utf8_files:
            self.bad_utf8_files.append(name)


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


def read_documents(source: Source, counts: ReadCounts) -> Iterator[Document]:
    """Yields the documents that hold more than white space, and counts the others.

    Bytes that aren't UTF-8 become U+FFFD and are counted.

    Raises:
        DataError: a file that can't be read, or a record without text; nothing is skipped.
    """
    for path in source.files:
        readers = {".jsonl": read_json_lines, ".parquet": read_parquet}
        try:
            for document in readers.get(path.suffix, read_text)(path, source, counts):
                if document.text.strip():
                    counts.documents += 1
                    yield document
                else:
                    counts.empty += 1
        except OSError as error:
            raise DataError(f"{path} can't be read ({error.strerror or error}); remove it from the source") from None


def read_text(path: Path, source: Source, counts: ReadCounts) -> Iterator[Document]:
    """The documents of a text file."""
    content = path.read_bytes()
    text = decode_utf8(content, source.name(path), counts)
    texts = text.split(source.separator) if source.separator else [text]
    for part in texts:
        yield Document(part, len(content) // len(texts))


def read_json_lines(path: Path, source: Source, counts: ReadCounts) -> Iterator[Document]:
    """One document per line: the text field of a JSON object."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path} line {number}"
            if not line.strip():
                yield Document("", len(line))
                continue
            try:
                record = json.loads(decode_utf8(line, source.name(path), counts))
            except ValueError as error:
                raise DataError(f"{where} isn't JSON ({error}); mend or remove the line") from None
            keys = list(record) if isinstance(record, dict) else []
            if source.text_field not in keys:
                raise DataError(
                    f"{where} has no field {source.text_field!r}; its fields: {keys}; choose by --text-field"
                )
            text = check_text(record[source.text_field], where)
            yield Document(replace_surrogates(text, source.name(path), counts), len(line))


def read_parquet(path: Path, source: Source, counts: ReadCounts) -> Iterator[Document]:
    """One document per row: the text column. Needs pyarrow."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(f"{path} needs pyarrow; install it with: pip install 'megascale[parquet]'") from None
    try:
        file = ParquetFile(path)
        columns = file.schema_arrow.names
        if source.text_field not in columns:
            raise DataError(
                f"{path} has no column {source.text_field!r}; its columns: {columns}; choose by --text-field"
            )
        row_bytes = file_stat(path).st_size // max(1, file.metadata.num_rows)
        batches = file.iter_batches(columns=[source.text_field])
        for number, text in enumerate(chain.from_iterable(batch.column(0).to_pylist() for batch in batches), 1):
            yield Document(check_text(text, f"{path} row {number}"), row_bytes)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} can't be read as parquet ({error}); mend or remove it") from None


def decode_utf8(content: bytes, name: str, counts: ReadCounts) -> str:
    """Decodes UTF-8; bytes that aren't become U+FFFD and are counted once per text."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        counts.note_bad_utf8(name)
        return content.decode(errors="replace")


def replace_surrogates(text: str, name: str, counts: ReadCounts) -> str:
    """Replaces lone surrogates, which JSON can spell and UTF-8 can't, and counts the text."""
    return decode_utf8(text.encode(errors="surrogatepass"), name, counts)


def check_text(text: object, where: str) -> str:
    """Takes a record's value as text; null is an empty text."""
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(f"{where} holds a {type(text).__name__} where text is expected; choose by --text-field")
    return text


def file_stat(path: Path):
    """Size and time of a file of the source."""
    try:
        return path.stat()
    except OSError as error:
        raise DataError(f"{path} can't be read ({error.strerror}); remove it from the source") from None
