"""A digest of a tensor that doesn't depend on how it is cut up: each part's digest is summed. Pure, without torch.

The digest of a tensor of 32-bit elements is the sum over its elements of weight(i) x bits(i) modulo 2^64, where i is
the element's place in the flattened whole tensor and weight(i) an odd number mixed from it (a round of splitmix64,
Steele et al. 2014, "Fast splittable pseudorandom number generators"). A change of any single element always shows,
since an odd weight has an inverse; other changes pass unseen with a chance of about 2^-32. It is no protection against
intent: for that there is the SHA-256 of each file.
"""

from collections.abc import Sequence

import numpy as np

from megascale.parallel.boxes import Box

MODULUS = 1 << 64
PIECE_ELEMENTS = 1 << 14
"""Elements worked on at a time: the intermediate values stay within a core's cache."""
_GAMMA, _MIX, _ONE = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(1)
_HALF, _SHIFT = np.uint64(32), np.uint64(29)


def digest_box(values: np.ndarray, shape: Sequence[int], box: Box) -> int:
    """What the elements of a box add to the digest of their tensor.

    Args:
        values: 1-D, 4 bytes an element, row-major within the box.
        shape: of the whole tensor.

    Cost: 0.5 GB/s a core or more.
    """
    first, outer, count = _runs(shape, box)
    rows = values.view(np.uint32).reshape(len(outer), count)
    places = np.arange(min(count, PIECE_ELEMENTS), dtype=np.uint64) + np.uint64(first)
    rows_at_once, total = max(1, PIECE_ELEMENTS // count), 0
    for row in range(0, len(outer), rows_at_once):
        part = slice(row, row + rows_at_once)
        for start in range(0, count, PIECE_ELEMENTS):
            bits = rows[part, start : start + PIECE_ELEMENTS]
            weights = (outer[part, None] + np.uint64(start)) + places[: bits.shape[1]]
            _mix(weights)
            weights *= bits
            total += int(weights.sum(dtype=np.uint64))
    return total % MODULUS


def _mix(z: np.ndarray) -> None:
    """Turns places into odd weights, in place."""
    z += _ONE
    z *= _GAMMA
    shifted = z >> _SHIFT
    z ^= shifted
    z *= _MIX
    np.right_shift(z, _HALF, out=shifted)
    z ^= shifted
    z |= _ONE


def _runs(shape: Sequence[int], box: Box) -> tuple[int, np.ndarray, int]:
    """The stretches of a box that are contiguous in the whole tensor: (first place, offset of each from it, length)."""
    strides = [1]
    for size in reversed(shape):
        strides.insert(0, strides[0] * size)
    count, dim = 1, len(shape)
    while dim and count == strides[dim]:  # the box has all of the dims after this one
        dim -= 1
        count *= box.stops[dim] - box.starts[dim]
    outer = np.zeros(1, np.uint64)
    for d in range(dim):
        steps = np.arange(box.stops[d] - box.starts[d], dtype=np.uint64) * np.uint64(strides[d + 1])
        outer = (outer[:, None] + steps).ravel()
    first = sum(start * stride for start, stride in zip(box.starts, strides[1:], strict=True))
    return first, outer, count
