"""The parity table: every layout against the plain single-process loop. `python -m tests.dist.parity_table` prints it.

Arguments: names of cases, all of them without any.
"""

import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from tests.support.layouts import CASES, HALF_PRECISION, LayoutCase
from tests.support.ranks import run_ranks

MODULE = "tests.dist.programs.layout_parity"
TOLERANCE = 1e-6
SLACK = 2.0
"""How many times further than one layout another may be from the plain loop in 16 bits: both only round."""
CASES_AT_ONCE = 8
KINDS = ("loss_gap", "norm_gap", "eval_gap")


def run_cases(cases: Sequence[LayoutCase], folder: Path) -> list[dict]:
    """Runs cases of one number of ranks in one launch; gives each one's gaps to the plain loop."""
    (ranks,) = {case.ranks for case in cases}
    names = json.dumps([case.name for case in cases])
    output = run_ranks(MODULE, ranks, [names], folder, timeout_s=60 + 60 * len(cases))
    results = [json.loads(line) for line in output[0].splitlines()]
    assert [result["name"] for result in results] == [case.name for case in cases]
    return results


def bounds_of(dtype: str, folder: Path) -> dict[str, float]:
    """How far a layout may be from the plain loop in a 16-bit format.

    From one layout, repeated with its rows split up in four ways: that changes the order of sums and nothing else.
    """
    alone = run_cases([case for case in HALF_PRECISION[dtype] if case.ranks == 1], folder)
    bounds = {kind: SLACK * max(result[kind] for result in alone) for kind in KINDS}
    return bounds | {"eval_gap": max(bounds["loss_gap"], bounds["eval_gap"])}  # a loss, each has one


def main(names: Sequence[str]) -> int:
    """Prints a line a case; the exit code says whether all are within the tolerance."""
    groups: dict[tuple[str, int], list[LayoutCase]] = defaultdict(list)
    for case in (CASES[name] for name in names or CASES):
        groups[case.precision.get("dtype", "fp32"), case.ranks].append(case)
    bounds, num_over = {"fp32": dict.fromkeys(KINDS, TOLERANCE)}, 0
    print(f"{'layout':<40} ranks      loss      norm  evaluation")
    for (dtype, ranks), cases in groups.items():
        for start in range(0, len(cases), CASES_AT_ONCE):
            with tempfile.TemporaryDirectory() as folder:
                if dtype not in bounds:
                    bounds[dtype] = bounds_of(dtype, Path(folder))
                for result in run_cases(cases[start : start + CASES_AT_ONCE], Path(folder)):
                    is_over = any(result[kind] > bounds[dtype][kind] for kind in KINDS)
                    num_over += is_over
                    shown = "  ".join(f"{result[kind]:8.1e}" for kind in KINDS)
                    print(f"{result['name']:<40} {ranks:>5}  {shown}{'  over' if is_over else ''}", flush=True)
    for dtype, bound in bounds.items():
        print(f"bounds in {dtype}: " + ", ".join(f"{kind} {value:.1e}" for kind, value in bound.items()))
    print(f"{num_over} of {len(names or CASES)} layouts over their bounds")
    return int(num_over > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
