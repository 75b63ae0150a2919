"""Hashes and permutations without state: what the row order and everything drawn at random are made of.

Numpy's random generators may change their streams between releases (NEP 19), so the hash is spelt out here; tests pin
its values for ever.

Source: splitmix64 (Steele, Lea, Flood, OOPSLA 2014); Feistel permutation with cycle walking (Black, Rogaway, CT-RSA
2002, section 4).
"""

import hashlib

import numpy as np

FEISTEL_ROUNDS = 4


def splitmix64(x: np.ndarray) -> np.ndarray:
    """Hashes each element of a uint64 array to a uint64, bijectively; sums and products wrap around."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def derive_key(*parts: int | np.ndarray) -> np.ndarray:
    """Hashes a sequence of non-negative integers, or of 1-D arrays that broadcast, to a 1-D array of uint64 keys."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = splitmix64(key ^ np.asarray(part, np.uint64))
    return key


def hash_name(name: str) -> int:
    """A number below 2^64 for a name, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def permute_below(x: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Permutes [0, size) by a key: elementwise, each element with its own size and key.

    The Feistel network permutes a power of 4 that is at least `size` and less than 4 times it; an image outside
    [0, size) is permuted again until it is inside, which keeps the whole a bijection.
    """
    size = np.asarray(size, np.uint64)
    _, size_bits = np.frexp((size - np.uint64(1)).astype(np.float64))  # the exponent of n is its bit length
    half_bits = np.maximum((size_bits + 1) // 2, 1).astype(np.uint64)
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    y = np.asarray(x).astype(np.uint64)
    assert (y < size).all(), "from outside, the walk might never come inside"
    outside = np.arange(len(y))
    while len(outside):
        left, right = y[outside] >> half_bits[outside], y[outside] & mask[outside]
        for number in range(FEISTEL_ROUNDS):
            round_hash = splitmix64(right ^ key[outside] ^ np.uint64(number << 56))
            left, right = right, left ^ (round_hash & mask[outside])
        y[outside] = (left << half_bits[outside]) | right
        outside = outside[y[outside] >= size[outside]]
    return y.astype(np.int64)
