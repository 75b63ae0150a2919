"""Texts to tokens on all cores, in the order of the texts whatever the number of workers."""

import hashlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_tools.corpora import Document
from megascale.data.tokenizer import load_tokenizer
from megascale.errors import DataError
from megascale.train.signals import stop_when_parent_dies

BATCH_BYTES = 1 << 20
"""Source bytes that a worker takes at a time: about 0.3 s of work, against 1 ms to send them."""

cached_tokenizer = lru_cache(1)(load_tokenizer)
"""A worker process loads its tokenizer once."""


class TokenizedBatch(NamedTuple):
    """Some documents as tokens, laid end to end.

    Attributes:
        tokens: uint32, each document with its end-of-text token.
        lengths: tokens of each document.
        text_bytes: UTF-8 bytes of each document.
        split_values: a number in [0, 1) per document that is a function of its text alone.
        source_bytes: share of the source's bytes, for progress.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    text_bytes: np.ndarray
    split_values: np.ndarray
    source_bytes: int


def hash_text(text: str) -> tuple[float, float]:
    """Two independent numbers in [0, 1) that are functions of the text: the split, and the tokenizer's sample."""
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little") / 2**64, int.from_bytes(digest[8:], "little") / 2**64


def tokenize_batch(tokenizer_path: Path, eos_id: int, documents: list[Document]) -> TokenizedBatch:
    """Tokenizes some documents in this process."""
    texts = [document.text for document in documents]
    encoded = cached_tokenizer(tokenizer_path).encode_batch_fast(texts, add_special_tokens=False)
    ids = [np.array([*encoding.ids, eos_id], np.uint32) for encoding in encoded]
    return TokenizedBatch(
        np.concatenate(ids),
        np.array([len(part) for part in ids], np.int64),
        np.array([len(text.encode()) for text in texts], np.int64),
        np.array([hash_text(text)[0] for text in texts]),
        sum(document.source_bytes for document in documents),
    )


def tokenize_documents(
    documents: Iterable[Document], tokenizer_path: Path, eos_id: int, workers: int
) -> Iterator[TokenizedBatch]:
    """Tokenizes documents by `workers` processes and yields them in their order.

    Cost: a few batches per worker in memory.

    Raises:
        DataError: a worker process died.
    """
    batches = batch_documents(documents)
    if workers == 1:
        yield from (tokenize_batch(tokenizer_path, eos_id, batch) for batch in batches)
        return
    # Not fork: the tokenizer library of this process has threads, and a lock that one of them holds would stay locked.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=prepare_worker)
    pending = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(tokenize_batch, tokenizer_path, eos_id, batch))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            f"one of {workers} tokenizing processes was killed, out of memory perhaps; use fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def prepare_worker() -> None:
    """One thread per process, since there is a process per core; Ctrl-C is left to the parent, whose end is ours."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stop_when_parent_dies()


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
