"""Exact copies among tokenized documents, by hash."""

import hashlib

import numpy as np

HASH_BYTES = 8
"""Of 10^9 documents 3 in 100 corpora have two different ones of one hash: n^2 / 2^65."""


def hash_documents(tokens: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """A uint64 for each document of a block, by its tokens.

    Args:
        tokens: of the block.
        ends: where each of its documents ends.

    Cost: about 2 us a document and 5 ns a token.
    """
    content = np.ascontiguousarray(tokens, "<u4").data.cast("B")
    stops = (ends.astype(np.int64) * 4).tolist()
    starts = [0, *stops[:-1]]
    digests = [
        hashlib.blake2b(content[start:stop], digest_size=HASH_BYTES).digest()
        for start, stop in zip(starts, stops, strict=True)
    ]
    return np.frombuffer(b"".join(digests), "<u8")
