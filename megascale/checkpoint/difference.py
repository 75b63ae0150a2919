"""In what two checkpoints differ: from their indices alone, and element by element where that is asked for."""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod, sqrt

import numpy as np

from megascale.checkpoint.compare import changed_values
from megascale.checkpoint.index import Change, CheckpointIndex, LineageRecord
from megascale.checkpoint.store import Content, Store
from megascale.checkpoint.tensor_file import HeaderError, entry_offset, read_box, read_header
from megascale.errors import CheckpointError
from megascale.parallel.boxes import Box, boxes_of_flat_range, intersect_boxes

BLOCK_ELEMENTS = 1 << 21
"""Elements of a tensor that are compared at a time: 8 MiB of each side, and 32 MiB of differences."""


@dataclass(frozen=True)
class Difference:
    """What differs between two checkpoints, first and second.

    Attributes:
        config, state, data, code: values that differ, by dotted key; data are the corpora, mixtures and splits.
        run_ids: both ids.
        lineage: turns in the history that only the first has, and that only the second has.
        num_equal: tensors with the same shape and digest.
        different: keys of those with the same shape and another digest.
        reshaped: key and both shapes of those whose shapes differ.
        only: keys that only the first has, and that only the second has.
    """

    config: tuple[Change, ...]
    state: tuple[Change, ...]
    data: tuple[Change, ...]
    code: tuple[Change, ...]
    run_ids: tuple[str, str]
    lineage: tuple[tuple[LineageRecord, ...], tuple[LineageRecord, ...]]
    num_equal: int
    different: tuple[str, ...]
    reshaped: tuple[Change, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]

    @property
    def has_equal_tensors(self) -> bool:
        """Whether both hold the same elements under the same names."""
        return not (self.different or self.reshaped or any(self.only))


@dataclass(frozen=True)
class ValueDifference:
    """How far two tensors a and b of one shape are apart.

    Attributes:
        key: of both.
        numel: their elements.
        num_different: elements whose bits differ.
        largest: max |a - b|.
        relative: the norm of a - b over the norm of a; infinite where a is zero.
    """

    key: str
    numel: int
    num_different: int
    largest: float
    relative: float


class TensorReader:
    """Reads boxes of a checkpoint's tensors, whatever layout wrote it; its files are opened once. Use `open_tensors`.

    The bytes aren't verified, only their places: see `megascale.checkpoint.verify`.
    """

    def __init__(self, store: Store, index: CheckpointIndex, files: contextlib.ExitStack):
        self._store, self._index, self._files = store, index, files
        self._headers: dict[str, tuple[Content, dict, int]] = {}

    def read(self, key: str, box: Box) -> np.ndarray:
        """The elements of a box of a tensor, as an array of the box's shape.

        Raises:
            CheckpointError: a file isn't what the index says.
        """
        values = np.empty(box.shape, np.float32)
        for part in self._index.tensors[key].slices:
            common = intersect_boxes(part.box, box)
            if common is None:
                continue
            try:
                content, header, first = self._open(part.file)
                start = first + entry_offset(header, part, content.size_bytes - first)
                values[common.slices_within(box)] = read_box(content, start, part.box, common)
            except (HeaderError, OSError) as error:
                place = f"{self._store.path(self._index.state.step)}/{part.file}"
                raise CheckpointError(f"{place}: not the file that the index describes: {error}") from None
        return values

    def _open(self, name: str) -> tuple[Content, dict, int]:
        if name not in self._headers:
            content = self._files.enter_context(self._store.open(self._index.state.step, name))
            self._headers[name] = (content, *read_header(content))
        return self._headers[name]


@contextlib.contextmanager
def open_tensors(store: Store, index: CheckpointIndex) -> Iterator[TensorReader]:
    """Opens the tensors of a checkpoint for reading box by box."""
    with contextlib.ExitStack() as files:
        yield TensorReader(store, index, files)


def compare_indices(first: CheckpointIndex, second: CheckpointIndex) -> Difference:
    """What differs, without reading a tensor: equal digests count as equal elements."""
    one, two = first.tensors, second.tensors
    shared = sorted(one.keys() & two.keys())
    same_shape = [key for key in shared if one[key].shape == two[key].shape]
    reshaped = sorted(set(shared) - set(same_shape))
    different = [key for key in same_shape if one[key].digest != two[key].digest]
    lineages = [index.run.lineage for index in (first, second)]
    data = [{"stream": asdict(index.run.stream), "validation": index.run.validation} for index in (first, second)]
    return Difference(
        config=tuple(changed_values(first.run.config, second.run.config)),
        state=tuple(changed_values(asdict(first.state), asdict(second.state))),
        data=tuple(changed_values(*data)),
        code=tuple(changed_values(first.run.code, second.run.code)),
        run_ids=(first.run.run_id, second.run.run_id),
        lineage=tuple(
            tuple(turn for turn in mine if turn not in other) for mine, other in (lineages, lineages[::-1])
        ),
        num_equal=len(same_shape) - len(different),
        different=tuple(different),
        reshaped=tuple(Change(key, list(one[key].shape), list(two[key].shape)) for key in reshaped),
        only=(tuple(sorted(one.keys() - two.keys())), tuple(sorted(two.keys() - one.keys()))),
    )


def compare_values(first: TensorReader, second: TensorReader, key: str, shape: tuple[int, ...]) -> ValueDifference:
    """How far two tensors are apart, block by block.

    Raises:
        CheckpointError: a file isn't what its index says.

    Cost: reads both once; 100 MiB of memory at most, whatever their size.
    """
    numel, num_different, largest, squares, scale = prod(shape), 0, 0.0, 0.0, 0.0
    for start in range(0, numel, BLOCK_ELEMENTS):
        for box in boxes_of_flat_range(shape, start, min(numel, start + BLOCK_ELEMENTS)):
            a, b = first.read(key, box), second.read(key, box)
            num_different += int(np.count_nonzero(a.view(np.uint32) != b.view(np.uint32)))
            apart = np.abs(a.astype(np.float64) - b)
            largest = float(np.maximum(largest, apart.max()))  # NaN stays NaN
            squares += float(np.square(apart).sum())
            scale += float(np.square(a, dtype=np.float64).sum())
    relative = sqrt(squares / scale) if scale else (float("inf") if squares else 0.0)
    return ValueDifference(key, numel, num_different, largest, relative)
