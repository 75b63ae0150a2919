"""The digest of a tensor: the same however it is cut up, and another one after any change."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.checkpoint import digest as digest_module
from megascale.checkpoint.digest import MODULUS, digest_box
from megascale.parallel.boxes import Box, boxes_of_flat_range, whole_box

shapes = st.lists(st.integers(1, 7), max_size=4).map(tuple)


def digest(values: np.ndarray, box: Box) -> int:
    return digest_box(np.ascontiguousarray(values[box.slices]).reshape(-1), values.shape, box)


def weight(place: int) -> int:
    """As the document of the format has it."""
    z = (place + 1) * 0x9E3779B97F4A7C15 % MODULUS
    z ^= z >> 29
    z = z * 0xBF58476D1CE4E5B9 % MODULUS
    return (z ^ (z >> 32)) | 1


@settings(deadline=None, max_examples=100)
@given(shapes, st.lists(st.integers(0, 1_000), max_size=4), st.integers(1, 20), st.integers(0, 2**32))
def test_parts_add_up_to_the_whole(shapes, cuts, piece_elements, seed):
    """Flat cuts as ZeRO makes, and columns as tensor parallelism does. Mutation: places counted within the box."""
    values = np.random.default_rng(seed).standard_normal(shapes).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digest_module, "PIECE_ELEMENTS", piece_elements)
        whole = digest(values, whole_box(shapes))
        edges = [0, *sorted(cut * values.size // 1000 for cut in cuts), values.size]
        flat = [box for ends in zip(edges, edges[1:]) for box in boxes_of_flat_range(shapes, *ends)]  # noqa: RUF007,B905
        assert sum(digest(values, box) for box in flat) % MODULUS == whole
        if shapes:
            columns = [Box((*(0,) * (len(shapes) - 1), at), (*shapes[:-1], at + 1)) for at in range(shapes[-1])]
            assert sum(digest(values, box) for box in columns) % MODULUS == whole
    bits = values.view(np.uint32).ravel().tolist()
    assert whole == sum(weight(place) * each for place, each in enumerate(bits)) % MODULUS


def test_every_flipped_bit_shows_and_so_do_swapped_elements():
    values = np.random.default_rng(1).standard_normal((5, 3)).astype(np.float32)
    whole = digest(values, whole_box(values.shape))
    for element in range(values.size):
        for bit in range(32):
            changed = values.copy()
            changed.view(np.uint32).ravel()[element] ^= np.uint32(1 << bit)
            assert digest(changed, whole_box(values.shape)) != whole
    for element in range(values.size - 1):
        swapped = values.copy().ravel()
        swapped[[element, element + 1]] = swapped[[element + 1, element]]
        assert digest(swapped.reshape(5, 3), whole_box(values.shape)) != whole
