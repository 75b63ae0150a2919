"""Tokens of a split on their way from the tokenizer to the shards: kept on disk, given back shuffled."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_tools.tokenize import TokenizedBatch
from megascale.data.order import derive_key

DOCUMENT_KEY = 3
"""Separates the hash of documents from those of the row order."""


class SplitSpill:
    """A file of tokens and, in memory, the length of each document.

    Units: 8 bytes of memory per document, as many bytes of disk as the shards will take.
    """

    def __init__(self, path: Path, dtype: np.dtype):
        self._path, self._dtype = path, dtype
        self._file = path.open("xb")
        self._lengths: list[np.ndarray] = []
        self.num_documents = self.text_bytes = 0

    def append(self, batch: TokenizedBatch, is_chosen: np.ndarray) -> None:
        """Adds the chosen documents of a batch."""
        self._file.write(batch.tokens[np.repeat(is_chosen, batch.lengths)].astype(self._dtype).tobytes())
        self._lengths.append(batch.lengths[is_chosen])
        self.num_documents += int(is_chosen.sum())
        self.text_bytes += int(batch.text_bytes[is_chosen].sum())

    def documents(self, seed: int) -> Iterator[np.ndarray]:
        """Yields the tokens of each document in an order shuffled over the whole split."""
        self._file.flush()
        tokens = np.memmap(self._path, self._dtype, "r")
        lengths = np.concatenate(self._lengths)
        ends = np.cumsum(lengths)
        order = np.argsort(derive_key(seed, DOCUMENT_KEY, np.arange(len(lengths))), kind="stable")
        for number in order.tolist():
            yield tokens[ends[number] - lengths[number] : ends[number]]

    def remove(self) -> None:
        """Deletes the file."""
        self._file.close()
        self._path.unlink()
