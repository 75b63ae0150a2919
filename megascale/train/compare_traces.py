"""Compares two traces of one run, phase by phase in the order of computation. Without torch, for the launcher."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isnan, sqrt

import numpy as np

from megascale.train.trace_files import Digest, StepFacts, TraceFolder

CHUNK_ELEMENTS = 1 << 22
"""Elements of a tensor in memory at a time."""
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Difference:
    """How far two traces are apart in one place.

    Attributes:
        step: counted from 1.
        phase: one of `PHASES`.
        name: of a layer, or of a parameter with what of it; empty for the loss and the norm.
        absolute: the largest difference of two elements; for a layer's output the L2 norm of the difference, estimated.
        relative: the same over the largest magnitude of the tensor; for a layer over the L2 norm of its output.
        index: of the worst element, None where there is none.
        is_equal: whether all is equal to the bit.
    """

    step: int
    phase: str
    name: str
    absolute: float
    relative: float
    index: tuple[int, ...] | None
    is_equal: bool


@dataclass(frozen=True)
class Adam:
    """What AdamW does with its moments."""

    beta1: float
    beta2: float
    eps: float

    def change(self, exp_avg: np.ndarray, exp_avg_sq: np.ndarray, facts: StepFacts) -> np.ndarray:
        """What an update adds to the weights besides their decay.

        Source: Loshchilov and Hutter 2019, algorithm 2.
        """
        if facts.updates == 0:  # all steps so far were skipped
            return np.zeros_like(exp_avg)
        mean = exp_avg / (1 - self.beta1**facts.updates)
        root = np.sqrt(exp_avg_sq / (1 - self.beta2**facts.updates))
        return -facts.learning_rate * mean / (root + self.eps)


def compare_traces(
    a: TraceFolder, b: TraceFolder, num_steps: int, adam: Adam, *, b_follows: bool
) -> Iterator[Difference]:
    """Yields a difference for each phase and tensor of each step, whether or not there is any, first ones first.

    Gradients come in the order of the backward pass, from the head down.

    Args:
        b_follows: whether b began each step after the first with a's state.
    """
    names = a.read_names()
    for step in range(1, num_steps + 1):
        facts_a, facts_b = a.read_facts(step), b.read_facts(step)
        if step == 1:
            for name in names.parameters:
                yield _compare_tensor(a, b, step, "start", "start", name)
        for name in names.layers:
            if name in facts_a.forward or name in facts_b.forward:
                yield _compare_digests(step, name, facts_a.forward.get(name), facts_b.forward.get(name))
        yield _compare_numbers(step, "loss", facts_a.loss, facts_b.loss)
        for name in reversed(names.parameters):
            yield _compare_tensor(a, b, step, "gradient", "gradient", name)
        yield _compare_numbers(step, "norm", facts_a.norm, facts_b.norm)
        for name in names.parameters:
            for kind in MOMENTS:
                yield _compare_tensor(a, b, step, "update", kind, name)
            yield _compare_masters(a, b, step, name, adam, facts_a, facts_b, b_follows)


def worst_of_phases(differences: list[Difference]) -> dict[tuple[int, str], Difference]:
    """The largest relative difference of each (step, phase)."""
    worst: dict[tuple[int, str], Difference] = {}
    for difference in differences:
        key = difference.step, difference.phase
        if key not in worst or difference.relative > worst[key].relative:
            worst[key] = difference
    return worst


def _compare_numbers(step: int, phase: str, a: float, b: float) -> Difference:
    is_equal = a == b
    absolute = 0.0 if is_equal else _or_infinite(abs(a - b))
    return Difference(step, phase, "", absolute, _ratio(absolute, max(abs(a), abs(b))), None, is_equal)


def _compare_digests(step: int, name: str, a: Digest | None, b: Digest | None) -> Difference:
    """Equal checksums say more than sketches, whose sums depend on their order in the last digits."""
    if a is None or b is None:
        return Difference(step, "forward", name, np.inf, np.inf, None, is_equal=False)
    is_equal = a.checksum == b.checksum
    squares = [(x - y) ** 2 for x, y in zip(a.sketch, b.sketch, strict=True)]
    absolute = 0.0 if is_equal else _or_infinite(sqrt(sum(squares) / len(squares)))
    size = sqrt(max(a.square_sum, b.square_sum))
    return Difference(step, "forward", name, absolute, _ratio(absolute, size), None, is_equal)


def _compare_tensor(a: TraceFolder, b: TraceFolder, step: int, phase: str, kind: str, name: str) -> Difference:
    shown = f"{name} ({kind})" if phase == "update" else name
    tensors = [trace.read_tensor(step, kind, name) for trace in (a, b)]
    if tensors[0].shape != tensors[1].shape:
        return Difference(step, phase, shown, np.inf, np.inf, None, is_equal=False)
    apart = Apart(tensors[0].shape)
    for parts in zip(*map(_chunks, tensors), strict=True):
        # The root of the second moment is on the scale of the gradient, and so of the tolerance.
        part_a, part_b = map(np.sqrt, parts) if kind == "exp_avg_sq" else parts
        apart.add(part_a, part_b, part_a - part_b)
    return apart.describe(step, phase, shown)


def _compare_masters(
    a: TraceFolder, b: TraceFolder, step: int, name: str, adam: Adam, facts_a: StepFacts, facts_b: StepFacts,
    b_follows: bool,
) -> Difference:
    """What of the difference neither the moments nor the weights before the update explain.

    AdamW divides by the size of the gradient, so where that is mere rounding the update is of full size, and anything.
    The moments themselves are compared as they are; here what each side made of its own.
    """
    kinds = ("master", *MOMENTS)
    sides = [[_chunks(trace.read_tensor(step, kind, name)) for kind in kinds] for trace in (a, b)]
    before = []
    if step == 1 or not b_follows:
        at = (step, "start") if step == 1 else (step - 1, "master")
        before = [_chunks(trace.read_tensor(*at, name)) for trace in (a, b)]
    apart = Apart(a.read_tensor(step, "master", name).shape)
    while (side_a := [next(parts, None) for parts in sides[0]])[0] is not None:
        side_b = [next(parts) for parts in sides[1]]
        unexplained = (side_a[0] - side_b[0]) - (adam.change(*side_a[1:], facts_a) - adam.change(*side_b[1:], facts_b))
        if before:
            unexplained -= next(before[0]) - next(before[1])
        apart.add(side_a[0], side_b[0], unexplained)
    return apart.describe(step, "update", f"{name} (master)")


class Apart:
    """The largest difference between two tensors, which come in parts."""

    def __init__(self, shape: tuple[int, ...]):
        self.shape, self.done = shape, 0
        self.absolute, self.place, self.size, self.is_equal = 0.0, None, 0.0, True

    def add(self, part_a: np.ndarray, part_b: np.ndarray, differences: np.ndarray) -> None:
        """Takes the next part of both, and what counts as their difference; equal infinities don't differ."""
        equal = part_a == part_b
        far = np.where(equal, 0.0, np.nan_to_num(np.abs(differences), nan=np.inf))
        worst = int(far.argmax())
        if far[worst] > self.absolute:
            self.absolute, self.place = float(far[worst]), self.done + worst
        finite = [np.abs(part[np.isfinite(part)]) for part in (part_a, part_b)]
        self.size = max(self.size, *(float(part.max(initial=0.0)) for part in finite))
        self.is_equal = self.is_equal and bool(equal.all())
        self.done += len(part_a)

    def describe(self, step: int, phase: str, name: str) -> Difference:
        """What was found."""
        index = None if self.place is None else tuple(map(int, np.unravel_index(self.place, self.shape)))
        return Difference(
            step, phase, name, self.absolute, _ratio(self.absolute, self.size), index, self.is_equal
        )


def _chunks(tensor: np.ndarray) -> Iterator[np.ndarray]:
    flat = tensor.reshape(-1)
    for start in range(0, len(flat), CHUNK_ELEMENTS):
        yield flat[start : start + CHUNK_ELEMENTS].astype(np.float64)


def _ratio(absolute: float, size: float) -> float:
    return absolute / size if size and absolute < np.inf else (np.inf if absolute else 0.0)


def _or_infinite(value: float) -> float:
    return np.inf if isnan(value) else value
