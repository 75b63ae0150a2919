"""Tokens of a chunk of the source on disk: what a build that was killed doesn't have to do again.

A chunk is three files, of which the last one written, `NUMBER.json`, declares it finished.
"""

import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_tools.readers import ReadCounts
from data_tools.write_shards import write_file

DOCUMENT_TABLE_DTYPE = np.dtype([("tokens", "<i8"), ("text_bytes", "<i8"), ("hash", "<u8", 2)])
"""A document: its tokens with the end-of-text token, its UTF-8 bytes, and the hash of its text."""
MIN_CHUNK_BYTES, MAX_CHUNK_BYTES = 1 << 20, 1 << 26
"""A chunk is 0.05 to 20 s of one core's work."""
USUAL_CHUNKS, MAX_CHUNKS = 256, 1 << 14
"""Enough to keep all cores busy to the end; few enough for a folder, and to map them all into memory."""


class TokenizedBatch(NamedTuple):
    """Some documents as tokens, laid end to end, and their rows of the document table."""

    tokens: np.ndarray
    documents: np.ndarray


class ChunkFacts(NamedTuple):
    """What is known of a finished chunk beside its tokens: counts, and why tiktoken's tokens were not taken."""

    counts: ReadCounts
    disagreement: str | None


def choose_chunk_bytes(source_bytes: int) -> int:
    """Source bytes of a chunk: a function of the source alone, so that a build goes on with other workers too."""
    usual = min(max(source_bytes // USUAL_CHUNKS, MIN_CHUNK_BYTES), MAX_CHUNK_BYTES)
    return max(usual, source_bytes // MAX_CHUNKS)


def write_chunk(folder: Path, number: int, batches: Iterable[TokenizedBatch], dtype: np.dtype) -> None:
    """Writes the tokens and documents of a chunk; `finish_chunk` then declares it finished."""
    tables = [np.zeros(0, DOCUMENT_TABLE_DTYPE)]
    with chunk_path(folder, number, "tokens").open("wb") as file:
        for batch in batches:
            file.write(batch.tokens.astype(dtype).tobytes())
            tables.append(batch.documents)
        file.flush()
        os.fsync(file.fileno())
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.concatenate(tables), version=(1, 0), allow_pickle=False)
    write_file(chunk_path(folder, number, "documents.npy"), buffer.getvalue())


def finish_chunk(folder: Path, number: int, facts: ChunkFacts) -> None:
    """Declares a chunk finished."""
    content = {"counts": asdict(facts.counts), "disagreement": facts.disagreement}
    write_file(chunk_path(folder, number, "json"), json.dumps(content).encode())


def is_finished(folder: Path, number: int) -> bool:
    """Whether a chunk was tokenized."""
    return chunk_path(folder, number, "json").exists()


def read_facts(folder: Path, number: int) -> ChunkFacts:
    """The facts of a finished chunk."""
    content = json.loads(chunk_path(folder, number, "json").read_bytes())
    return ChunkFacts(ReadCounts(**content["counts"]), content["disagreement"])


def chunk_path(folder: Path, number: int, suffix: str) -> Path:
    """A file of a chunk."""
    return folder / f"{number:06d}.{suffix}"


class ChunkedDocuments:
    """The documents of finished chunks, in the order of the source. Token files are mapped, not read.

    Units: 48 bytes of memory per document.
    """

    def __init__(self, folder: Path, numbers: Iterable[int], dtype: np.dtype):
        paths = [chunk_path(folder, number, "tokens") for number in numbers]
        tables = [np.load(path.with_suffix(".documents.npy")) for path in paths]
        self.table = np.concatenate([np.zeros(0, DOCUMENT_TABLE_DTYPE), *tables])
        """The rows of all documents."""
        self._tokens = [
            np.asarray(np.memmap(path, dtype, "r")) if len(table) else np.zeros(0, dtype)
            for path, table in zip(paths, tables, strict=True)
        ]
        self._chunk_starts = np.cumsum([0, *map(len, self._tokens)])
        self._ends = np.cumsum(self.table["tokens"])
        self._chunks = np.searchsorted(self._chunk_starts, self._ends - self.table["tokens"], "right") - 1

    def read(self, numbers: np.ndarray) -> Iterator[np.ndarray]:
        """Yields the tokens of the documents of these numbers."""
        for number in numbers.tolist():
            chunk = self._chunks[number]
            stop = self._ends[number] - self._chunk_starts[chunk]
            yield self._tokens[chunk][stop - self.table["tokens"][number] : stop]


def find_duplicates(hashes: np.ndarray) -> np.ndarray:
    """Which documents are copies of an earlier one, by the hash of their text.

    Args:
        hashes: uint64, shape [documents, 2].

    Cost: two sorts; 40 bytes of memory per document.
    """
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: copies stay in their order
    is_equal = (hashes[order[1:]] == hashes[order[:-1]]).all(1)
    is_duplicate = np.zeros(len(hashes), bool)
    is_duplicate[order[1:][is_equal]] = True
    return is_duplicate
