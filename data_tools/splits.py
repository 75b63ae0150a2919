"""From the tokens of all chunks to the shards of each split: chosen by the hash of the text, shuffled, written."""

import hashlib
from pathlib import Path

import numpy as np
from rich.console import Console

from data_tools.chunks import ChunkedDocuments, find_duplicates
from data_tools.progress import track_bytes
from data_tools.settings import BuildSettings
from data_tools.write_shards import write_index, write_shards
from megascale.data.permutation import derive_key

SPLITS = ("train", "validation")
TOKENIZER_FILE = "tokenizer.json"
DOCUMENT_KEY = 3
"""Separates the hash of documents from those of the row order."""
PART_SHARDS = 1_000_000
"""Numbers of shards that a part of an array has: names and sample keys of two parts never meet."""
PART_DOCUMENTS = 1 << 40
"""Numbers of documents that a part has in the order of documents: parts aren't shuffled alike."""


def choose_documents(documents: ChunkedDocuments, settings: BuildSettings) -> tuple[dict[str, np.ndarray], int]:
    """The documents of each split by number, in the order of the source, and how many are dropped as copies."""
    hashes = documents.table["hash"]
    is_dropped = find_duplicates(hashes) if settings.deduplicate else np.zeros(len(hashes), bool)
    is_validation = hashes[:, 0] / 2.0**64 < settings.validation_fraction
    chosen = {"train": ~is_validation & ~is_dropped, "validation": is_validation & ~is_dropped}
    return {split: np.flatnonzero(is_chosen) for split, is_chosen in chosen.items()}, int(is_dropped.sum())


def write_split(
    folder: Path,
    split: str,
    documents: ChunkedDocuments,
    numbers: np.ndarray,
    settings: BuildSettings,
    part: int,
    console: Console,
    **facts,
) -> None:
    """Writes a split's documents as shards and index, shuffled over the whole split.

    Args:
        folder: the corpus; the tokenizer is in it.
        split: its name.
        documents: all documents.
        numbers: those of the split.
        settings: sizes and seed.
        part: of an array, 0 without one.
        console: where progress is shown.
        facts: dtype, vocab_size and eos_id, as `Index` has them.
    """
    rows = documents.table[numbers]
    keys = derive_key(settings.seed, DOCUMENT_KEY, part * PART_DOCUMENTS + np.arange(len(numbers)))
    order, dtype = numbers[np.argsort(keys, kind="stable")], np.dtype(facts["dtype"])
    with track_bytes(console, f"write {split}", int(rows["tokens"].sum()) * dtype.itemsize) as advance:

        def read():
            for tokens in documents.read(order):
                advance(tokens.nbytes)
                yield tokens

        shards = write_shards(
            folder / split, read(), dtype.newbyteorder("<"), settings.shard_tokens, settings.block_tokens,
            part * PART_SHARDS,
        )  # fmt: skip
    tokenizer_sha256 = hashlib.sha256((folder / TOKENIZER_FILE).read_bytes()).hexdigest()
    write_index(
        folder / split,
        shards,
        split=split,
        text_bytes=int(rows["text_bytes"].sum()),
        tokenizer_file=TOKENIZER_FILE,
        tokenizer_sha256=tokenizer_sha256,
        **facts,
    )
