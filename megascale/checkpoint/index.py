"""The index of a checkpoint: one JSON value that says what the run was and which file holds which part of each tensor.

It is checked strictly on reading, because everything else trusts it: types, hashes, names of files, and that the
slices of each tensor cover it exactly once. `docs/checkpoint_format.md` describes it field by field.
"""

import hashlib
import platform
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any

from megascale.checkpoint.files import FileRecord, read_bounded
from megascale.checkpoint.records import MisfitError, parse_record
from megascale.checkpoint.state import RunState
from megascale.data.stream import StreamRecord
from megascale.errors import CheckpointError
from megascale.parallel.boxes import Box, tiles_exactly

INDEX_NAME = "index.json"
SUMS_NAME = "SHA256SUMS"
FORMAT_NAME = "megascale-checkpoint"
FORMAT_VERSION = 2
MAX_JSON_BYTES = 32 << 20
"""Largest index, list of hashes or acknowledgement that is read: 200,000 slices, twice what 10,000 ranks write for a
70B model, and an upper bound on what a hostile file can make a reader allocate."""
MAX_DIMS = 8
"""Most dims of a tensor; bounds the work per slice when the tiling is checked."""
DTYPE = "F32"
BYTES_PER_ELEMENT = 4
_RANK_FILE = re.compile(r"rank_[0-9]{5,9}\.safetensors")


@dataclass(frozen=True)
class SliceRecord:
    """Where one part of a tensor is stored.

    Attributes:
        file: name of the safetensors file, in the checkpoint's folder.
        entry: name of the tensor within that file; its shape is stops - starts.
        starts: first index of the part, per dim.
        stops: index after the last one, per dim.
    """

    file: str
    entry: str
    starts: tuple[int, ...]
    stops: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.starts) != len(self.stops):
            raise MisfitError(f"{len(self.stops)} dims, but starts has {len(self.starts)}", "stops")
        if any(start >= stop for start, stop in zip(self.starts, self.stops, strict=True)):
            raise MisfitError(f"{self.stops} leaves nothing after starts {self.starts}", "stops")

    @property
    def box(self) -> Box:
        return Box(self.starts, self.stops)


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of the training state.

    Attributes:
        shape: of the whole tensor in the unsharded model.
        dtype: element type, in safetensors' words.
        slices: parts that together cover the tensor exactly once.
    """

    shape: tuple[int, ...]
    dtype: str
    slices: tuple[SliceRecord, ...]

    def __post_init__(self) -> None:
        if self.dtype != DTYPE:
            raise MisfitError(f"{self.dtype!r} is not {DTYPE}, the only type of this format", "dtype")
        if len(self.shape) > MAX_DIMS:
            raise MisfitError(f"{len(self.shape)} dims are more than {MAX_DIMS}", "shape")
        for part in self.slices:
            if len(part.starts) != len(self.shape):
                raise MisfitError(f"entry {part.entry} has {len(part.starts)} dims, not {len(self.shape)}", "slices")
        if not tiles_exactly((part.box for part in self.slices), self.shape):
            stored = sum(part.box.numel for part in self.slices)
            raise MisfitError(
                f"hold {stored} elements and don't cover the tensor's {prod(self.shape)} exactly once", "slices"
            )


@dataclass(frozen=True)
class RunRecord:
    """Which run a checkpoint belongs to, and what that run computes.

    Attributes:
        run_id: made once for a run folder, so that a stranger's checkpoint is never taken for one's own.
        config: the resolved config as plain nested values.
        config_fingerprint: hash of the part of the config that decides what is computed.
        stream: what its rows depend on beside the config.
        validation: fingerprint of each corpus's validation split.
        code: versions of what computed it, see `code_versions`.
    """

    run_id: str
    config: dict[str, Any]
    config_fingerprint: str
    stream: StreamRecord
    validation: dict[str, str]
    code: dict[str, str]


@dataclass(frozen=True)
class CheckpointIndex:
    """Everything about a checkpoint except the numbers in its tensors.

    Attributes:
        format: always `megascale-checkpoint`.
        format_version: rises with each change that an older reader would misread.
        run: the run that wrote it.
        state: the position of the run.
        files: size and hash of each safetensors file.
        tensors: by key, such as `master/blocks.0.attention.qkv.weight` or `exp_avg/head.weight`.
    """

    format: str
    format_version: int
    run: RunRecord
    state: RunState
    files: dict[str, FileRecord]
    tensors: dict[str, TensorRecord]

    def __post_init__(self) -> None:
        if (self.format, self.format_version) != (FORMAT_NAME, FORMAT_VERSION):
            raise MisfitError(
                f"{self.format} {self.format_version}, but this version of megascale reads only"
                f" {FORMAT_NAME} {FORMAT_VERSION}", "format_version",
            )
        for name in self.files:
            if not _RANK_FILE.fullmatch(name):
                raise MisfitError("not the name of a rank's file", "files", name)
        self._check_entries()

    def _check_entries(self) -> None:
        entries: set[tuple[str, str]] = set()
        stored_bytes = dict.fromkeys(self.files, 0)
        for key, record in self.tensors.items():
            for part in record.slices:
                if part.file not in stored_bytes:
                    raise MisfitError(f"{part.file} is not among files", "tensors", key)
                if (part.file, part.entry) in entries:
                    raise MisfitError(f"entry {part.entry} of {part.file} serves two slices", "tensors", key)
                entries.add((part.file, part.entry))
                stored_bytes[part.file] += part.box.numel * BYTES_PER_ELEMENT
        for name, needed in stored_bytes.items():
            if self.files[name].bytes < needed:
                raise MisfitError(f"{self.files[name].bytes}, but its slices need {needed}", "files", name, "bytes")


def code_versions(git_commit: str | None = None) -> dict[str, str]:
    """Versions of this project, Python and the packages that decide the numbers; the commit where it is known."""
    versions = {"python": platform.python_version()}
    for package in ("megascale", "torch", "deepspeed"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions | ({"git_commit": git_commit} if git_commit else {})


def hash_list(index: CheckpointIndex, index_text: bytes) -> bytes:
    """The text of `SHA256SUMS`, as `sha256sum -c` reads it: every file of the checkpoint, the index included."""
    hashes = {name: record.sha256 for name, record in index.files.items()}
    hashes[INDEX_NAME] = hashlib.sha256(index_text).hexdigest()
    return "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes)).encode()


def read_index(folder: Path) -> CheckpointIndex:
    """Reads the index of a checkpoint, and checks it against itself and against the list of hashes.

    Raises:
        CheckpointError: missing, too large, changed since it was written, or not a valid index.
    """
    path = folder / INDEX_NAME
    text = read_bounded(path, MAX_JSON_BYTES)
    sums = read_bounded(folder / SUMS_NAME, MAX_JSON_BYTES)
    for name, content in ((INDEX_NAME, text), (SUMS_NAME, sums)):
        if content is None:
            raise CheckpointError(f"{folder / name}: missing, not a regular file, or over {MAX_JSON_BYTES} bytes")
    index = parse_record(CheckpointIndex, text, path)
    if sums != hash_list(index, text):
        raise CheckpointError(f"{folder / SUMS_NAME}: doesn't match {INDEX_NAME}; one of them was changed")
    return index
