"""The index of a checkpoint: one JSON value that says what the run was and which file holds which part of each tensor.

It is checked strictly on reading, because everything else trusts it: types, hashes, names of files, and that the
slices of each tensor cover it exactly once. `docs/checkpoint_format.md` describes it field by field.
"""

import hashlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from megascale.checkpoint.files import FileRecord, read_bounded
from megascale.checkpoint.state import Record, RunState
from megascale.errors import CheckpointError
from megascale.parallel.boxes import Box, tiles_exactly

INDEX_NAME = "index.json"
SUMS_NAME = "SHA256SUMS"
FORMAT_NAME = "megascale-checkpoint"
FORMAT_VERSION = 1
MAX_JSON_BYTES = 64 << 20
"""Largest index, list of hashes or acknowledgement that is read: 400,000 slices, more than 10,000 ranks write, and an
upper bound on what a hostile file can make a reader allocate."""
MAX_DIMS = 8
"""Most dims of a tensor; bounds the work per slice when the tiling is checked."""
BYTES_PER_ELEMENT = 4

Count = Annotated[int, Field(ge=0, lt=2**63)]
Position = Annotated[tuple[Count, ...], Field(max_length=MAX_DIMS)]
RankFile = Annotated[str, Field(pattern=r"^rank_[0-9]{5,9}\.safetensors$")]
R = TypeVar("R", bound=Record)


class SliceRecord(Record):
    """Where one part of a tensor is stored.

    Attributes:
        file: name of the safetensors file, in the checkpoint's folder.
        entry: name of the tensor within that file; its shape is stops - starts.
        starts: first index of the part, per dim.
        stops: index after the last one, per dim.
    """

    file: RankFile
    entry: str
    starts: Position
    stops: Position

    @property
    def box(self) -> Box:
        return Box(self.starts, self.stops)


class TensorRecord(Record):
    """One tensor of the training state.

    Attributes:
        shape: of the whole tensor in the unsharded model.
        dtype: element type, in safetensors' words.
        slices: parts that together cover the tensor exactly once.
    """

    shape: Position
    dtype: Literal["F32"]
    slices: tuple[SliceRecord, ...]

    @model_validator(mode="after")
    def _slices_tile(self) -> "TensorRecord":
        for part in self.slices:
            if not len(part.starts) == len(part.stops) == len(self.shape):
                raise ValueError(f"slice {part.entry} has {len(part.starts)} dims, the tensor {len(self.shape)}")
            if any(start >= stop for start, stop in zip(part.starts, part.stops, strict=True)):
                raise ValueError(f"slice {part.entry} is empty")
        if not tiles_exactly((part.box for part in self.slices), self.shape):
            stored = sum(part.box.numel for part in self.slices)
            raise ValueError(f"its slices hold {stored} elements and don't cover its {prod(self.shape)} exactly once")
        return self


class RunRecord(Record):
    """Which run a checkpoint belongs to, and what that run computes.

    Attributes:
        run_id: made once for a run folder, so that a stranger's checkpoint is never taken for one's own.
        config: the resolved config as plain nested values.
        config_fingerprint: hash of the part of the config that decides what is computed.
        data_fingerprints: hash of each split of the corpus.
        code: versions of what computed it, see `code_versions`.
    """

    run_id: str = Field(min_length=1)
    config: dict[str, Any]
    config_fingerprint: str
    data_fingerprints: dict[str, str]
    code: dict[str, str]


class CheckpointIndex(Record):
    """Everything about a checkpoint except the numbers in its tensors.

    Attributes:
        format: always `megascale-checkpoint`.
        format_version: rises with each change that an older reader would misread.
        run: the run that wrote it.
        state: the position of the run.
        files: size and hash of each safetensors file.
        tensors: by key, such as `master/blocks.0.attention.qkv.weight` or `exp_avg/head.weight`.
    """

    format: Literal["megascale-checkpoint"]
    format_version: Literal[1]
    run: RunRecord
    state: RunState
    files: dict[RankFile, FileRecord]
    tensors: dict[str, TensorRecord]

    @model_validator(mode="after")
    def _files_hold_slices(self) -> "CheckpointIndex":
        entries: set[tuple[str, str]] = set()
        stored_bytes = dict.fromkeys(self.files, 0)
        for key, record in self.tensors.items():
            for part in record.slices:
                if part.file not in stored_bytes:
                    raise ValueError(f"tensors.{key} lies in {part.file}, which files doesn't list")
                if (part.file, part.entry) in entries:
                    raise ValueError(f"two slices name entry {part.entry} of {part.file}")
                entries.add((part.file, part.entry))
                stored_bytes[part.file] += part.box.numel * BYTES_PER_ELEMENT
        for name, needed in stored_bytes.items():
            if self.files[name].bytes < needed:
                raise ValueError(f"files.{name}.bytes = {self.files[name].bytes} is less than its slices' {needed}")
        return self


def code_versions(git_commit: str | None = None) -> dict[str, str]:
    """Versions of this project, Python and the packages that decide the numbers; the commit where it is known."""
    versions = {"python": platform.python_version()}
    for package in ("megascale", "torch", "deepspeed"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions | ({"git_commit": git_commit} if git_commit else {})


def to_json(values: dict[str, Any]) -> bytes:
    """One line of JSON; floats keep every bit."""
    return (json.dumps(values) + "\n").encode()


def parse_record(kind: type[R], text: bytes, path: Path) -> R:
    """Checks JSON strictly against a kind of record.

    Raises:
        CheckpointError: what is wrong with the first bad field, with the file and the field's dotted name.
    """
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in problem["loc"])
        raise CheckpointError(f"{path}: {field + ': ' if field else ''}{problem['msg']}") from None


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
