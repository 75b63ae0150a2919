"""Samples of a raw WebDataset, read by webdataset after its structure was found sound.

webdataset takes a damaged header for the end of a tar, in silence, so every header is walked first, and both must count
the same samples. Members that hold no text are neither read nor decoded.
"""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

from data_tools.tar_walk import walk_tar
from megascale.errors import DataError

TEXT_EXTENSIONS = ("txt", "json")
"""Members that hold text, the first that a sample has being taken."""


class Sample(NamedTuple):
    """The text member of a sample, and the byte of the tar at which the sample ends."""

    key: str
    extension: str
    content: bytes
    end: int


def read_samples(path: Path, max_bytes: int) -> Iterator[Sample]:
    """The samples of a tar in its order.

    Raises:
        DataError: the tar is cut short, damaged or hostile, or a sample has no text.
    """
    with path.open("rb") as file:
        ends = walk_samples(file, path, max_bytes)
        file.seek(0)
        members, num_samples = tar_file_expander([{"url": str(path), "stream": file}], select_files=is_text), 0
        try:
            for sample in group_by_keys(members):
                key, num_samples = sample["__key__"], num_samples + 1
                extension = next(extension for extension in TEXT_EXTENSIONS if extension in sample)
                yield Sample(key, extension, sample[extension], ends.get(key, 0))
        except (tarfile.TarError, ValueError) as error:
            raise DataError(f"{path} can't be read by webdataset ({error}); make it again") from None
    if num_samples != len(ends):
        raise DataError(f"{path}: webdataset reads {num_samples} samples, its headers hold {len(ends)}; make it again")


def walk_samples(file, path: Path, max_bytes: int) -> dict[str, int]:
    """Where each sample ends, by key, in the order of the tar, as its headers alone say."""
    ends: dict[str, int] = {}
    extensions: dict[str, list[str]] = {}
    for member in walk_tar(file, str(path)):
        key, extension = base_plus_ext(member.name)
        if key is None:
            continue
        if is_text(member.name) and member.size > max_bytes:
            raise DataError(f"{path}: member {member.name} has {member.size} bytes, a text may have {max_bytes}")
        if key in extensions and key != next(reversed(extensions)):
            raise DataError(f"{path}: the members of sample {key} lie apart; sort the tar by name")
        extensions.setdefault(key, []).append(extension.lower())
        ends[key] = member.offset + member.size
    for key, found in extensions.items():
        if not set(TEXT_EXTENSIONS) & set(found):
            raise DataError(f"{path}: sample {key} has no member .txt or .json to take text from, only: {found}")
    return ends


def is_text(name: str) -> bool:
    """Whether a member may hold a sample's text."""
    _, extension = base_plus_ext(name)
    return extension is not None and extension.lower() in TEXT_EXTENSIONS
