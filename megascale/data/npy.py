"""Arrays from the bytes of .npy files that may be damaged or forged."""

import io
from math import prod

import numpy as np


def parse_npy(content: bytes, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The array of a .npy file that must have this type and shape. Nothing is made of what its header claims.

    Raises:
        ValueError: it is something else.
    """
    file = io.BytesIO(content)
    try:
        np.lib.format.read_magic(file)
        found, is_fortran, found_dtype = np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # the header is parsed as Python, and fails as Python does
        raise ValueError(f"not a .npy file: {error}") from None
    elements = memoryview(content)[file.tell() :]
    if (found, found_dtype, is_fortran, len(elements)) != (shape, dtype, False, prod(shape) * dtype.itemsize):
        order = " in Fortran's order" if is_fortran else ""
        raise ValueError(
            f"{len(elements)} bytes of type {found_dtype} and shape {found}{order}, expected {dtype} and {shape}"
        )
    return np.frombuffer(elements, dtype).reshape(shape)
