"""Which corpus each row number reads, and how many rows of a corpus come before it. Pure, and constant in the position.

Row number g reads the corpus that a cyclic table of P entries has at g mod P. Every corpus has exactly its count of
entries there, spread as evenly as they go, so that any run of rows, a small step too, has its share of each corpus.
A later stage of the mixture has another table.

Row number g is also row g div V of lane g mod V. Lane v meets the entries v, v + V, v + 2 V, ... of the table and comes
round after L = P / gcd(P, V) turns; the table is kept in the order of these walks, so that a lane's rows of a corpus
are a difference of two counts.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from math import gcd

import numpy as np

from megascale.data.mixture import MixtureStage

NEVER = 2**63 - 1
"""A row number that no run reaches."""
ALL = slice(None)
PARTS = 128
"""Of a range that is searched, counted in one call: 3 calls search a period of 64 lanes."""


class Weave:
    """Rows of corpora woven into a sequence, and counted by lane.

    Args:
        stages: the mixtures, the first one from row 0; their counts all add up to the same period P.
        num_lanes: lanes V.

    Units: 4 bytes of memory for each corpus, place of the period and stage; 64 KiB at P = 16384.
    """

    def __init__(self, stages: Sequence[MixtureStage], num_lanes: int):
        self.num_lanes = num_lanes
        self.first_rows = [stage.first_row for stage in stages]
        self.counts = np.array([stage.counts for stage in stages], np.int64)
        self.period = int(self.counts[0].sum())
        assert self.first_rows[0] == 0, self.first_rows
        assert self.first_rows == sorted(set(self.first_rows)), self.first_rows
        assert (self.counts.sum(1) == self.period).all(), "stages of different periods"
        num_walks, lanes = gcd(self.period, num_lanes), np.arange(num_lanes)
        self._turns = self.period // num_walks
        """Turns after which a lane comes round."""
        self._walks = lanes % num_walks
        """Which walk each lane is on."""
        self._phases = lanes // num_walks * pow(num_lanes // num_walks, -1, self._turns) % self._turns
        """And where on it the lane begins: walk w starts at entry w and steps V entries a turn."""
        entries = (np.arange(num_walks)[:, None] + num_lanes * np.arange(self._turns)) % self.period
        self._tables = np.stack([spread_evenly(stage.counts)[entries] for stage in stages])
        occurs = self._tables[:, None] == np.arange(len(stages[0].counts))[:, None, None]
        self._occurrences = (np.cumsum(occurs, -1) - occurs).astype(np.int32)
        self._walk_counts = occurs.sum(-1)
        self._bases = self._build_bases()

    def locate(self, row_numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Maps row numbers to their corpora, and to the rows of that corpus that their lanes read before them."""
        lanes = row_numbers % self.num_lanes
        stages = np.searchsorted(self.first_rows, row_numbers, "right") - 1
        rounds, places = np.divmod(row_numbers // self.num_lanes + self._phases[lanes], self._turns)
        walks = self._walks[lanes]
        corpora = self._tables[stages, walks, places]
        before = rounds * self._walk_counts[stages, corpora, walks] + self._occurrences[stages, corpora, walks, places]
        return corpora, self._bases[stages, corpora, lanes] + before

    def lane_counts(
        self, row_number: int | np.ndarray, corpus: int | slice = ALL, stage: int | None = None
    ) -> np.ndarray:
        """Rows of a corpus, or of each one, that every lane reads below a row number: [lanes] or [corpora, lanes].

        With a `stage`, which must begin at or below the row number, as if it lasted for ever; then a column of row
        numbers gives a row of lanes for each.
        """
        stage = self.stage_at(row_number) if stage is None else stage
        turns = count_in_lanes(row_number, self.num_lanes) + self._phases
        return self._bases[stage, corpus] + self._count_turns(stage, corpus, turns)

    def row_after(self, corpus: int, count: int, stage: int | None = None) -> int:
        """The smallest row number with `count` rows of the corpus below it, or NEVER.

        With a `stage`, which must give the corpus rows and begin with at most `count` of them read, as if it lasted for
        ever.
        """
        if count == 0:
            return 0
        if stage is None:
            stage = max(bisect_left(self._rows_before_stage[:, corpus], count) - 1, 0)
            if self.counts[stage, corpus] == 0:
                return NEVER
        # Rounds of all lanes are counted at once; the rest is found by cutting the range into parts.
        round_rows = self.num_lanes * self._turns
        round_count = round_rows // self.period * int(self.counts[stage, corpus])
        missing = count - int(self._rows_before_stage[stage, corpus])
        below = self.first_rows[stage] + max(missing - 1, 0) // round_count * round_rows
        reached = below + round_rows
        while reached - below > 1:
            cuts = below + (reached - below) * np.arange(1, PARTS + 1) // PARTS
            found = int(np.searchsorted(self.lane_counts(cuts[:, None], corpus, stage).sum(1), count))
            below, reached = int(cuts[found - 1]) if found else below, int(cuts[found])
        return reached

    def stage_at(self, row_number: int) -> int:
        """The stage that a row number belongs to."""
        return bisect_right(self.first_rows, row_number) - 1

    def _build_bases(self) -> np.ndarray:
        """What to add to a lane's count of turns in a stage for its count since row 0: [stages, corpora, lanes]."""
        bases, before = [], np.zeros((self.counts.shape[1], self.num_lanes), np.int64)
        rows_before = []
        for stage, first_row in enumerate(self.first_rows):
            turns = count_in_lanes(first_row, self.num_lanes) + self._phases
            if stage:
                before = bases[-1] + self._count_turns(stage - 1, ALL, turns)
            rows_before.append(before.sum(1))
            bases.append(before - self._count_turns(stage, ALL, turns))
        self._rows_before_stage = np.stack(rows_before)
        return np.stack(bases)

    def _count_turns(self, stage: int, corpus: int | slice, turns: np.ndarray) -> np.ndarray:
        rounds, places = np.divmod(turns, self._turns)
        counts, occurrences = self._walk_counts[stage, corpus], self._occurrences[stage, corpus]
        return counts[..., self._walks] * rounds + occurrences[..., self._walks, places]


def count_in_lanes(row_number: int | np.ndarray, num_lanes: int) -> np.ndarray:
    """How many row numbers below `row_number` each lane has."""
    return row_number // num_lanes + (np.arange(num_lanes) < row_number % num_lanes)


def spread_evenly(counts: Sequence[int]) -> np.ndarray:
    """A table in which each corpus has its count of entries, the i-th of n due at (i + 1/2) / n of the table.

    The quotients of equal fractions are equal floats, and ties go by the order of corpora, so the table is exact.
    """
    due = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
    return np.repeat(np.arange(len(counts)), counts)[np.argsort(due, kind="stable")]
