"""Texts to tokens on all cores, chunk by chunk; each chunk is the same whoever makes it, and by which engine."""

import hashlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from data_tools.chunks import DOCUMENT_TABLE_DTYPE, ChunkFacts, TokenizedBatch, finish_chunk, write_chunk
from data_tools.corpora import Piece, Source
from data_tools.fast_bpe import RECHECK_EVERY, FastBpe, find_disagreement
from data_tools.readers import PAIR_SEPARATOR, Document, ReadCounts, read_piece
from megascale.data.tokenizer import encode_texts, load_tokenizer
from megascale.errors import DataError
from megascale.train.signals import stop_when_parent_dies

BATCH_BYTES = 1 << 20
"""Source bytes that are tokenized at a time."""

Encode = Callable[[Sequence[str], np.ndarray], list[np.ndarray]]
"""Gives the ids of each text; it is told the texts' hashes too."""


class TokenizeJob(NamedTuple):
    """What is the same for all chunks.

    Attributes:
        source: how its files are read.
        folder: where finished chunks go.
        tokenizer_path: the tokenizer.
        tokenizer_sha256: its hash, by which a process knows the one that it has loaded.
        eos_id: the token that ends a document.
        dtype: of a token on disk.
        use_fast: whether tiktoken is used.
        keep: (i, n) to keep only the documents of which the hash modulo n is i.
    """

    source: Source
    folder: Path
    tokenizer_path: Path
    tokenizer_sha256: str
    eos_id: int
    dtype: np.dtype
    use_fast: bool
    keep: tuple[int, int] = (0, 1)


class DisagreementError(Exception):
    """tiktoken gave other ids than tokenizers, or none, and for which text."""


@lru_cache(1)
def cached_tokenizer(path: Path, sha256: str) -> Tokenizer:
    """A worker process loads its tokenizer once."""
    return load_tokenizer(path)


@lru_cache(1)
def cached_fast(path: Path, sha256: str) -> FastBpe:
    """The same tokenizer for tiktoken."""
    return FastBpe(path.read_bytes())


def hash_text(content: bytes) -> tuple[int, int]:
    """Two independent 64-bit numbers that are functions of a text: the split is drawn by the first."""
    digest = hashlib.blake2b(content, digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def tokenize_chunk(job: TokenizeJob, number: int, pieces: tuple[Piece, ...]) -> int:
    """Tokenizes a chunk in this process and writes it. Returns the source's bytes that it stands for."""
    facts = ChunkFacts(ReadCounts(), None)
    encode = choose_encode(job, job.use_fast)
    try:
        write_chunk(job.folder, number, tokenize_pieces(job, pieces, encode, facts.counts), job.dtype)
    except DisagreementError as error:
        facts = ChunkFacts(ReadCounts(), str(error))
        encode = choose_encode(job, use_fast=False)
        write_chunk(job.folder, number, tokenize_pieces(job, pieces, encode, facts.counts), job.dtype)
    if job.keep[0] > 0:  # every part meets the same empty and bad texts: the first one counts them
        facts = ChunkFacts(ReadCounts(documents=facts.counts.documents), facts.disagreement)
    finish_chunk(job.folder, number, facts)
    return sum(piece.num_bytes for piece in pieces)


def choose_encode(job: TokenizeJob, use_fast: bool) -> Encode:
    """The engine of a chunk."""
    tokenizer = cached_tokenizer(job.tokenizer_path, job.tokenizer_sha256)
    if not use_fast:
        return lambda texts, hashes: encode_slow(tokenizer, texts)
    fast = cached_fast(job.tokenizer_path, job.tokenizer_sha256)
    return lambda texts, hashes: encode_fast(fast, tokenizer, texts, hashes)


def encode_slow(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Ids by tokenizers."""
    return [np.array(ids, np.uint32) for ids in encode_texts(tokenizer, texts)]


def encode_fast(fast: FastBpe, tokenizer: Tokenizer, texts: Sequence[str], hashes: np.ndarray) -> list[np.ndarray]:
    """Ids by tiktoken, one text in `RECHECK_EVERY` compared with tokenizers.

    Raises:
        DisagreementError: they differ, or tiktoken can't take a text.
    """
    chosen = np.flatnonzero((hashes[:, 1] >> np.uint64(32)) % RECHECK_EVERY == 0)
    disagreement = find_disagreement(fast, tokenizer, [texts[number] for number in chosen])
    if disagreement:
        raise DisagreementError(disagreement)
    try:
        return [fast.encode(text) for text in texts]
    except ValueError as error:
        raise DisagreementError(f"tiktoken can't take a text ({error})") from None


def tokenize_pieces(
    job: TokenizeJob, pieces: Iterable[Piece], encode: Encode, counts: ReadCounts
) -> Iterator[TokenizedBatch]:
    """Tokenizes the documents of some pieces, a batch at a time, and counts what it met."""
    documents = chain.from_iterable(read_piece(job.source, piece, counts) for piece in pieces)
    index, modulus = job.keep
    for batch in batch_documents(documents):
        table = describe_texts([document.text for document in batch])
        is_kept = table["hash"][:, 1] % modulus == index
        counts.documents -= int((~is_kept).sum())
        texts, table = [batch[number].text for number in np.flatnonzero(is_kept)], table[is_kept]
        if texts:
            ids = encode_pairs(texts, table["hash"], encode, job.eos_id) if job.source.target_field else encode(
                texts, table["hash"]
            )
            table["tokens"] = [len(part) + 1 for part in ids]
            eos = np.array([job.eos_id], np.uint32)
            yield TokenizedBatch(np.concatenate([part for text_ids in ids for part in (text_ids, eos)]), table)


def encode_pairs(texts: Sequence[str], hashes: np.ndarray, encode: Encode, eos_id: int) -> list[np.ndarray]:
    """Ids of the first text of each pair, the end-of-text token, and ids of the second."""
    parts = [part for text in texts for part in text.split(PAIR_SEPARATOR)]
    ids = encode(parts, np.repeat(hashes, 2, axis=0))
    eos = np.array([eos_id], np.uint32)
    return [np.concatenate((source, eos, target)) for source, target in zip(ids[::2], ids[1::2], strict=True)]


def describe_texts(texts: Sequence[str]) -> np.ndarray:
    """The document table of some texts, their numbers of tokens aside."""
    contents = [text.encode() for text in texts]
    return np.array([(0, len(content), hash_text(content)) for content in contents], DOCUMENT_TABLE_DTYPE)


def batch_documents(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Groups documents into lists of about `BATCH_BYTES`."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def tokenize_chunks(job: TokenizeJob, chunks: dict[int, tuple[Piece, ...]], workers: int) -> Iterator[int]:
    """Tokenizes chunks by `workers` processes and yields the source bytes of each as it is finished.

    Raises:
        DataError: a text that can't be read, or a worker process died. Chunks that are finished stay finished.
    """
    workers = min(workers, len(chunks))
    if workers <= 1:
        yield from (tokenize_chunk(job, number, pieces) for number, pieces in chunks.items())
        return
    before = set(multiprocessing.active_children())
    # Not fork: the tokenizer library of this process has threads, and a lock that one of them holds would stay locked.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=prepare_worker)
    try:
        futures = [pool.submit(tokenize_chunk, job, number, pieces) for number, pieces in chunks.items()]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        raise DataError(
            f"one of {workers} tokenizing processes was killed, out of memory perhaps; use fewer --workers: the same "
            "command goes on where this one ended"
        ) from None
    except BaseException:
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()  # a chunk may take minutes, and nobody waits for it any more
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def prepare_worker() -> None:
    """One thread per process, since there is a process per core; Ctrl-C is left to the parent, whose end is ours."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stop_when_parent_dies()
    if not multiprocessing.parent_process().is_alive():
        os._exit(1)  # it died while this process started: no signal is due any more, and no work would ever come
