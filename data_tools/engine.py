"""Which library tokenizes a source: tiktoken where it was seen to agree, tokenizers otherwise."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from data_tools.corpora import Piece, Source
from data_tools.fast_bpe import AWKWARD_TEXTS, FastBpe, UnknownKindError, find_disagreement
from data_tools.readers import ReadCounts, read_piece
from megascale.data.tokenizer import load_tokenizer

SAMPLED_CHUNKS, SAMPLED_DOCUMENTS, SAMPLED_BYTES = 16, 64, 1 << 17
"""Texts that engines are compared on: from so many places of the source, so many documents, so many bytes of each."""


class Engine(NamedTuple):
    """The choice, and why it was made, as a phrase that follows "tokenized by"."""

    is_fast: bool
    reason: str

    def with_disagreements(self, disagreements: dict[int, str]) -> "Engine":
        """The same, with chunks named that were done by tokenizers after all."""
        if not disagreements:
            return self
        number, text = next(iter(disagreements.items()))
        return self._replace(
            reason=f"{self.reason}; {len(disagreements)} chunks by tokenizers, since in chunk {number} {text}"
        )


def choose_engine(source: Source, chunks: dict[int, tuple[Piece, ...]], path: Path, allow_fast: bool) -> Engine:
    """Compares both engines on awkward texts and on a sample of the source."""
    if not allow_fast:
        return Engine(False, "tokenizers, as asked")
    try:
        fast = FastBpe(path.read_bytes())
    except UnknownKindError as error:
        return Engine(False, f"tokenizers (no fast path: {error})")
    texts = list(sample_texts(source, chunks))
    disagreement = find_disagreement(fast, load_tokenizer(path), [*AWKWARD_TEXTS, *texts])
    if disagreement:
        return Engine(False, f"tokenizers (no fast path: by tiktoken {disagreement})")
    return Engine(
        True, f"tiktoken, its ids equal on {len(AWKWARD_TEXTS)} awkward texts and {len(texts)} documents of the source"
    )


def sample_texts(source: Source, chunks: dict[int, tuple[Piece, ...]]) -> Iterator[str]:
    """The first documents of chunks that are spread over a source. Long ones are cut."""
    found = list(chunks.values())
    number = min(SAMPLED_CHUNKS, len(found))
    for pieces in (found[place * len(found) // number] for place in range(number)):
        size = 0
        documents = (document for piece in pieces for document in read_piece(source, piece, ReadCounts()))
        for document in islice(documents, SAMPLED_DOCUMENTS):
            yield document.text[: SAMPLED_BYTES - size]
            size += len(document.text)
            if size >= SAMPLED_BYTES:
                break
