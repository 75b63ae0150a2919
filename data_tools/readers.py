"""The documents of text files, JSON lines, parquet files and raw WebDatasets, one after the other."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from data_tools.compressed import COMPRESSED_SUFFIXES, inner_suffix, open_content
from data_tools.corpora import Piece, Source, cut_source
from data_tools.raw_tar import read_samples
from megascale.errors import DataError

MAX_DOCUMENT_BYTES = 1 << 30
"""Longest line or text that is read. A longer one is a mistake, or a bomb in a compressed file."""
READ_BYTES = 1 << 20
PAIR_SUFFIXES = (".jsonl", ".tsv")
PAIR_SEPARATOR = "\x1e"
"""Between the two texts of a pair on its way to the tokens, where the end-of-text token takes its place."""


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
        duplicates: copies of an earlier text, where they were to be dropped.
        bad_utf8: texts with bytes that aren't UTF-8, which are replaced.
        bad_utf8_files: the first few files that hold such texts.
    """

    documents: int = 0
    empty: int = 0
    duplicates: int = 0
    bad_utf8: int = 0
    bad_utf8_files: list[str] = field(default_factory=list)

    def note_bad_utf8(self, name: str) -> None:
        self.bad_utf8 += 1
        self._name_bad_files([name])

    def add(self, other: "ReadCounts") -> None:
        """Counts what was met in a later part of the source."""
        self.documents += other.documents
        self.empty += other.empty
        self.duplicates += other.duplicates
        self.bad_utf8 += other.bad_utf8
        self._name_bad_files(other.bad_utf8_files)

    def _name_bad_files(self, names: list[str]) -> None:
        self.bad_utf8_files = list(dict.fromkeys([*self.bad_utf8_files, *names]))[:3]


def read_documents(source: Source, counts: ReadCounts) -> Iterator[Document]:
    """Yields all documents of a source as `read_piece` does."""
    for pieces in cut_source(source, chunk_bytes=1 << 40):
        yield from chain.from_iterable(read_piece(source, piece, counts) for piece in pieces)


def read_piece(source: Source, piece: Piece, counts: ReadCounts) -> Iterator[Document]:
    """Yields the documents of a piece that hold more than white space, and counts the others.

    Bytes that aren't UTF-8 become U+FFFD and are counted.

    Raises:
        DataError: a file that can't be read, or a record without text; nothing is skipped.
    """
    try:
        for document in reader_of(piece.path, is_pairs=source.target_field is not None)(piece, source, counts):
            if document.text.strip():
                counts.documents += 1
                yield document
            else:
                counts.empty += 1
    except OSError as error:
        raise DataError(f"{piece.path} can't be read ({error.strerror or error}); remove it from the source") from None


def reader_of(path: Path, *, is_pairs: bool) -> Callable[[Piece, Source, ReadCounts], Iterator[Document]]:
    """What reads a file of this name.

    Raises:
        DataError: such a file has no lines, or no pairs of texts.
    """
    suffix = inner_suffix(path)
    if suffix in (".parquet", ".tar") and path.suffix in COMPRESSED_SUFFIXES:
        raise DataError(f"{path}: a {suffix} file is read without compression around it; decompress it")
    if is_pairs:
        if suffix not in PAIR_SUFFIXES:
            raise DataError(f"{path}: pairs are read from {' or '.join(PAIR_SUFFIXES)}; write it as one of them")
        return read_lines
    return {".jsonl": read_lines, ".parquet": read_parquet, ".tar": read_tar}.get(suffix, read_text)


def read_text(piece: Piece, source: Source, counts: ReadCounts) -> Iterator[Document]:
    """The documents of a text file."""
    separator = (source.separator or "").encode()
    with open_content(piece.path) as (file, raw):
        done = 0
        for content in split_text(file, separator, piece.path):
            text = decode_utf8(content, source.name(piece.path), counts)
            yield Document(text, raw.tell() - done)
            done = raw.tell()


def split_text(file: BinaryIO, separator: bytes, path: Path) -> Iterator[bytes]:
    """The texts between separators; without a separator all of the file.

    Raises:
        DataError: a text is longer than any document may be.
    """
    pending, searched = bytearray(), 0
    while content := file.read(READ_BYTES):
        pending += content
        while separator and (end := pending.find(separator, searched)) >= 0:
            yield bytes(pending[:end])
            del pending[: end + len(separator)]
            searched = 0
        searched = max(0, len(pending) - len(separator) + 1)
        check_size(len(pending), str(path))
    yield bytes(pending)


def read_lines(piece: Piece, source: Source, counts: ReadCounts) -> Iterator[Document]:
    """One document per line: the text field of a JSON object, or a pair."""
    path = piece.path
    with open_content(path) as (file, raw):
        first = skip_to_line(file, piece.start)
        done = raw.tell()
        for number, line in enumerate(take_lines(file, first, piece, path), 1):
            try:
                text = read_line(line, source, source.name(path), counts)
            except ValueError as error:
                where = f"{path} line {count_lines(path, first) + number}"
                raise DataError(f"{where} {error}") from None
            yield Document(text, raw.tell() - done)
            done = raw.tell()


def skip_to_line(file: BinaryIO, start: int) -> int:
    """Moves to the first line that begins at byte `start` or later and returns where that is."""
    if start == 0:
        return 0
    file.seek(start - 1)
    while (part := file.readline(READ_BYTES)) and not part.endswith(b"\n"):
        pass
    return file.tell()


def take_lines(file: BinaryIO, first: int, piece: Piece, path: Path) -> Iterator[bytes]:
    """The lines that begin before the end of a piece, `first` being the byte at which the file stands."""
    is_whole = path.suffix in COMPRESSED_SUFFIXES
    while (is_whole or first < piece.stop) and (line := file.readline(MAX_DOCUMENT_BYTES + 1)):
        check_size(len(line), f"{path}: the line at byte {first}")
        first += len(line)
        yield line


def count_lines(path: Path, stop: int) -> int:
    """Lines that end before a byte of a file, to say in an error which one it was."""
    with path.open("rb") as file:
        sizes = [READ_BYTES] * (stop // READ_BYTES) + [stop % READ_BYTES]
        return sum(file.read(size).count(b"\n") for size in sizes)


def read_line(content: bytes, source: Source, name: str, counts: ReadCounts) -> str:
    """The text of a line of JSON or, of a source of pairs, the two texts with `PAIR_SEPARATOR` between them.

    A line of a .tsv file is a pair by itself: two texts with a tab between them.

    Raises:
        ValueError: what is wrong, to be completed by where.
    """
    is_table = source.target_field is not None and inner_suffix(Path(name)) == ".tsv"
    text = "" if is_table else read_record(content, source.text_field, name, counts)
    if source.target_field is None or not content.strip():
        return text
    if is_table:
        texts = decode_utf8(content, name, counts).rstrip("\r\n").split("\t")
        if len(texts) != 2:
            raise ValueError(f"has {len(texts)} columns; a pair has two, source and target, with a tab between them")
    else:
        texts = text, read_record(content, source.target_field, name, counts)
    if not all(part.strip() for part in texts) or any(PAIR_SEPARATOR in part for part in texts):
        raise ValueError("isn't a pair: a text is empty, or has the control character U+001E; mend or remove it")
    return PAIR_SEPARATOR.join(texts)


def read_record(content: bytes, text_field: str, name: str, counts: ReadCounts) -> str:
    """The text of a JSON object; nothing at all is an empty text.

    Raises:
        ValueError: what is wrong, to be completed by where.
    """
    if not content.strip():
        return ""
    try:
        record = json.loads(decode_utf8(content, name, counts))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"isn't JSON ({error}); mend or remove it") from None
    keys = list(record) if isinstance(record, dict) else []
    if text_field not in keys:
        raise ValueError(f"has no field {text_field!r}; its fields: {keys}; choose by --text-field")
    return replace_surrogates(check_text(record[text_field]), name, counts)


def read_tar(piece: Piece, source: Source, counts: ReadCounts) -> Iterator[Document]:
    """One document per sample of a raw WebDataset: its member .txt, or the text field of its member .json."""
    path, name, done = piece.path, source.name(piece.path), 0
    for sample in read_samples(path, MAX_DOCUMENT_BYTES):
        try:
            if sample.extension == "txt":
                text = decode_utf8(sample.content, name, counts)
            else:
                text = read_record(sample.content, source.text_field, name, counts)
        except ValueError as error:
            raise DataError(f"{path} member {sample.key}.json {error}") from None
        yield Document(text, sample.end - done)
        done = sample.end


def read_parquet(piece: Piece, source: Source, counts: ReadCounts) -> Iterator[Document]:
    """One document per row: the text column. Needs pyarrow."""
    path = piece.path
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
        row_bytes = piece.num_bytes // max(1, file.metadata.num_rows)
        batches = file.iter_batches(columns=[source.text_field])
        for number, text in enumerate(chain.from_iterable(batch.column(0).to_pylist() for batch in batches), 1):
            try:
                yield Document(check_text(text), row_bytes)
            except ValueError as error:
                raise DataError(f"{path} row {number} {error}") from None
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
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


def check_text(text: object) -> str:
    """Takes a record's value as text; null is an empty text."""
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"holds a {type(text).__name__} where text is expected; choose by --text-field")
    return text


def check_size(size: int, what: str) -> None:
    """Refuses a text that no document can be."""
    if size > MAX_DOCUMENT_BYTES:
        raise DataError(
            f"{what} is longer than {MAX_DOCUMENT_BYTES} bytes, the most that one text may have; cut it into documents "
            "(--separator for text files), or remove it from the source"
        )
