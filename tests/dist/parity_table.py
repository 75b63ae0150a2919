"""The parity table: every layout against the plain single-process loop. `python -m tests.dist.parity_table` prints it.

Arguments: names of cases, all of them without any.
"""

import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from tests.support.layouts import CASES, LayoutCase
from tests.support.ranks import run_ranks

MODULE = "tests.dist.programs.layout_parity"
TOLERANCE = 1e-6
CASES_AT_ONCE = 8


def run_cases(cases: Sequence[LayoutCase], folder: Path) -> list[dict]:
    """Runs cases of one number of ranks in one launch; gives each one's gaps to the plain loop."""
    (ranks,) = {case.ranks for case in cases}
    names = json.dumps([case.name for case in cases])
    output = run_ranks(MODULE, ranks, [names], folder, timeout_s=60 + 60 * len(cases))
    results = [json.loads(line) for line in output[0].splitlines()]
    assert [result["name"] for result in results] == [case.name for case in cases]
    return results


def main(names: Sequence[str]) -> int:
    """Prints a line a case; the exit code says whether all are within the tolerance."""
    by_ranks: dict[int, list[LayoutCase]] = defaultdict(list)
    for case in (CASES[name] for name in names or CASES):
        by_ranks[case.ranks].append(case)
    print(f"{'layout':<40} ranks      loss      norm  evaluation")
    worst = 0.0
    for cases in by_ranks.values():
        for start in range(0, len(cases), CASES_AT_ONCE):
            with tempfile.TemporaryDirectory() as folder:
                for result in run_cases(cases[start : start + CASES_AT_ONCE], Path(folder)):
                    gaps = [result[f"{what}_gap"] for what in ("loss", "norm", "eval")]
                    shown = "  ".join(f"{gap:8.1e}" for gap in gaps)
                    print(f"{result['name']:<40} {cases[0].ranks:>5}  {shown}", flush=True)
                    worst = max(worst, *gaps)
    print(f"largest difference {worst:.1e}, tolerance {TOLERANCE:.0e}, {len(names or CASES)} layouts")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
