"""How many rows each step reads: one number, or a batch that grows during the run. Pure."""

from bisect import bisect_right
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchPlan:
    """The rows of each step over all replicas.

    Attributes:
        first_steps: the step at which each size begins, rising from 0.
        sizes: rows of a step from there on.
    """

    first_steps: tuple[int, ...]
    sizes: tuple[int, ...]

    def rows_of(self, step: int) -> int:
        """Rows that a step reads."""
        return self.sizes[bisect_right(self.first_steps, step) - 1]

    def first_row(self, step: int) -> int:
        """The number of the first row that a step reads: the rows of all steps before it."""
        stops = (*self.first_steps[1:], step)
        return sum(
            (min(stop, step) - first) * size
            for first, stop, size in zip(self.first_steps, stops, self.sizes, strict=True)
            if first < step
        )


def constant_batch(rows: int) -> BatchPlan:
    """The plan of a batch that never changes."""
    return BatchPlan((0,), (rows,))
