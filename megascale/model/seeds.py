"""Random seeds from names: independent of ranks, of call order and of Python's hash seed."""

from hashlib import blake2b


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part, such as (run seed, parameter name).

    63 bits fit an int64 tensor and a `torch.Generator` alike. BLAKE2b keeps neighbouring seeds and names unrelated.
    """
    digest = blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
