"""The rows of the leak test: documents packed into rows, and which of them gets other tokens. Pure, without torch.

Shapes: B rows, T positions.
"""

from collections.abc import Sequence

import numpy as np

from megascale.data.permutation import derive_key

CHOICES = ("first", "middle", "last", "longest")
"""Documents of each row that get other tokens, one after the other."""
TOKENS_KEY = 1
"""Separates the hash of the rows from others of the same seed."""


def pack_random(row_numbers_B: Sequence[int], seq_len: int, vocab_size: int, seed: int) -> tuple[np.ndarray, ...]:
    """Rows of random tokens: one document takes half of a row, others of 1 token and more lie around it.

    Each row is a function of the seed and its number, so that the ranks of a replica agree on it.

    Returns:
        tokens_BT, int64; documents_BT, int32: the number of the document of each position, rising along a row.
    """
    tokens, documents = [], []
    for number in row_numbers_B:
        random = np.random.default_rng(derive_key(seed, TOKENS_KEY, number))
        tokens.append(random.integers(0, vocab_size, seq_len))
        lengths = random_lengths(random, seq_len)
        documents.append(np.repeat(np.arange(len(lengths), dtype=np.int32), lengths))
    return np.stack(tokens), np.stack(documents)


def random_lengths(random: np.random.Generator, seq_len: int) -> list[int]:
    """Lengths of the documents of a row: a half somewhere, the others drawn evenly on a logarithmic scale."""
    lengths, rest = [], seq_len - seq_len // 2
    while rest:
        lengths.append(int(np.exp(random.uniform(0, np.log(rest)))))
        rest -= lengths[-1]
    lengths.insert(int(random.integers(0, len(lengths) + 1)), seq_len // 2)
    return lengths


def choose(documents_BT: np.ndarray, choice: str | None) -> np.ndarray:
    """Where the chosen document of each row is; nowhere for None. Shape: (B, T) bool."""
    if choice is None:
        return np.zeros(documents_BT.shape, bool)
    return np.stack([documents_T == pick_document(documents_T, choice) for documents_T in documents_BT])


def pick_document(documents_T: np.ndarray, choice: str) -> int:
    """The number of one document of a row."""
    numbers, lengths = np.unique(documents_T, return_counts=True)
    places = {"first": 0, "middle": len(numbers) // 2, "last": -1, "longest": lengths.argmax()}
    return int(numbers[places[choice]])


def perturb(tokens_BT: np.ndarray, chosen_BT: np.ndarray, vocab_size: int) -> np.ndarray:
    """The tokens with each chosen one changed to the next id."""
    return np.where(chosen_BT, (tokens_BT + 1) % vocab_size, tokens_BT)
