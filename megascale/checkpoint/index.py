"""The index of a checkpoint: one JSON value that says what the run was and which file holds which part of each tensor.

It is checked strictly on reading, because everything else trusts it: types, hashes, names of files, and that the
slices of each tensor cover it exactly once. `docs/checkpoint_format.md` describes it field by field.
"""

import hashlib
import json
import platform
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from math import prod
from typing import Any

from megascale.checkpoint.files import FileRecord
from megascale.checkpoint.records import MisfitError, parse_record
from megascale.checkpoint.state import RunState
from megascale.data.stream import StreamRecord
from megascale.errors import CheckpointError
from megascale.parallel.boxes import Box, tiles_exactly

INDEX_NAME = "index.json"
SUMS_NAME = "SHA256SUMS"
FORMAT_NAME = "megascale-checkpoint"
FORMAT_VERSION = 3
MAX_JSON_BYTES = 32 << 20
"""Largest index, list of hashes or acknowledgement that is read: 200,000 slices, twice what 10,000 ranks write for a
70B model, and an upper bound on what a hostile file can make a reader allocate."""
MAX_DIMS = 8
"""Most dims of a tensor; bounds the work per slice when the tiling is checked."""
LINEAGE_KINDS = ("changed", "fork", "import")
DTYPE = "F32"
BYTES_PER_ELEMENT = 4
_DIGEST = re.compile(r"[0-9a-f]{16}")
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
        digest: of all elements, however they are cut up, see `megascale.checkpoint.digest`: 16 hexadecimal digits.
        slices: parts that together cover the tensor exactly once.
    """

    shape: tuple[int, ...]
    dtype: str
    digest: str
    slices: tuple[SliceRecord, ...]

    def __post_init__(self) -> None:
        if self.dtype != DTYPE:
            raise MisfitError(f"{self.dtype!r} is not {DTYPE}, the only type of this format", "dtype")
        if not _DIGEST.fullmatch(self.digest):
            raise MisfitError(f"{self.digest!r} is not 16 hexadecimal digits", "digest")
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
class Change:
    """One value that differs between a checkpoint and the run that goes on from it; values are plain JSON."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key} = {self.old!r} then, {self.new!r} now"


@dataclass(frozen=True)
class LineageRecord:
    """One turn in the history of a run's weights.

    Attributes:
        kind: `changed` (resumed with another config), `fork` (begun from another run's checkpoint) or `import` (begun
            from weights alone).
        step: completed steps when it happened.
        source: the folder that the state came from.
        run_id: the run that it came from; None for weights of strangers.
        changes: what was allowed to change what is computed.
    """

    kind: str
    step: int
    source: str
    run_id: str | None
    changes: tuple[Change, ...]

    def __post_init__(self) -> None:
        if self.kind not in LINEAGE_KINDS:
            raise MisfitError(f"{self.kind!r} is none of {', '.join(LINEAGE_KINDS)}", "kind")


@dataclass(frozen=True)
class ProbeRow:
    """One row of the probe batch, as it was read: see `megascale.data.row.Row`."""

    tokens: tuple[int, ...]
    ends: tuple[int, ...]
    resumed: tuple[int, ...]


@dataclass(frozen=True)
class ProbeRecord:
    """A batch and its loss under the saved weights, with which a reader tests that it has the same model.

    Attributes:
        rows: the batch.
        loss: mean negative log-likelihood per label token, in nats, without dropout.
        num_tokens: label tokens of the batch.
        dtype: precision that it was computed in.
    """

    rows: tuple[ProbeRow, ...]
    loss: float
    num_tokens: int
    dtype: str


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
        lineage: where its weights come from and what was changed on the way, oldest first; empty for a run that began
            at step 0 and was never changed.
    """

    run_id: str
    config: dict[str, Any]
    config_fingerprint: str
    stream: StreamRecord
    validation: dict[str, str]
    code: dict[str, str]
    lineage: tuple[LineageRecord, ...]


@dataclass(frozen=True)
class CheckpointIndex:
    """Everything about a checkpoint except the numbers in its tensors.

    Attributes:
        format: always `megascale-checkpoint`.
        format_version: rises with each change that an older reader would misread.
        run: the run that wrote it.
        state: the position of the run.
        probe: None where none was asked for.
        files: size and hash of each safetensors file.
        tensors: by key, such as `master/blocks.0.attention.qkv.weight` or `exp_avg/head.weight`.
    """

    format: str
    format_version: int
    run: RunRecord
    state: RunState
    probe: ProbeRecord | None
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


class OtherVersionError(CheckpointError):
    """A checkpoint that another version of megascale reads: no damage, so nothing to pass over or move away."""


def parse_index(text: bytes | None, sums: bytes | None, place: str) -> CheckpointIndex:
    """Reads an index, and checks it against itself and against the list of hashes.

    Args:
        text, sums: contents of the two files, None where one couldn't be read.
        place: the checkpoint's folder, for messages.

    Raises:
        OtherVersionError: whole, but written by a version of megascale with another format.
        CheckpointError: missing, too large, changed since it was written, or not a valid index.
    """
    for name, content in ((INDEX_NAME, text), (SUMS_NAME, sums)):
        if content is None:
            raise CheckpointError(f"{place}/{name}: missing, not a regular file, or over {MAX_JSON_BYTES} bytes")
    _check_version(text, sums, place)
    index = parse_record(CheckpointIndex, text, f"{place}/{INDEX_NAME}")
    if sums != hash_list(index, text):
        raise CheckpointError(f"{place}/{SUMS_NAME}: doesn't match {INDEX_NAME}; one of them was changed")
    return index


def _check_version(text: bytes, sums: bytes, place: str) -> None:
    """Says which version to use, where the hash tells that the index is as it was written."""
    if f"{hashlib.sha256(text).hexdigest()}  {INDEX_NAME}\n".encode() not in sums:
        return
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return
    found = values.get("format_version") if isinstance(values, dict) and values.get("format") == FORMAT_NAME else None
    if isinstance(found, int) and found != FORMAT_VERSION:
        age, remedy = ("a newer", "update it") if found > FORMAT_VERSION else ("an older", "use that one")
        raise OtherVersionError(
            f"{place}/{INDEX_NAME}: format_version {found} was written by {age} megascale; this one reads"
            f" {FORMAT_VERSION}: {remedy}"
        )
