"""`python -m tests.fault.fault_table [--rows 1,2] [--names PATTERN] [--json FILE]`: faults of a launched run, scored.

Runs the cases one after the other and prints a table; the exit code is 1 when a case has a problem.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from tests.fault.launched.cases import CASES
from tests.fault.launched.score import Case, Score, run_case
from tests.support.corpus import make_corpus
from tests.support.launched_run import clean_run

HEAD = "| row | fault | detected s | all down s | next step s | steps lost | named | curve equal | exit | attempts |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="", help="only cases of these rows, such as 1,2,11")
    parser.add_argument("--names", default="", help="only cases whose name has this pattern")
    parser.add_argument("--json", type=Path, help="file for all scores")
    parser.add_argument("--folder", type=Path, help="where runs are kept; default a temporary one")
    asked = parser.parse_args()
    rows = {int(row) for row in asked.rows.split(",") if row}
    cases = [case for case in CASES if (not rows or rows & set(case.rows)) and re.search(asked.names, case.name)]
    with tempfile.TemporaryDirectory(prefix="fault_table_") as folder:
        scores = run_all(cases, asked.folder or Path(folder))
    if asked.json:
        asked.json.write_text(json.dumps([asdict(score) for score in scores], indent=1) + "\n")
    print("\n" + table(scores))
    sys.exit(1 if any(score.problems for score in scores) else 0)


def run_all(cases: list[Case], folder: Path) -> list[Score]:
    """Runs cases, and each of their shapes once without a fault."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus = make_corpus(folder / "corpus", vocab_size=64)
    clean: dict[str, Path] = {}
    scores = []
    for number, case in enumerate(cases):
        shape = repr((case.shape.nodes * case.shape.ranks_per_node, case.shape.changes))
        if case.is_completed and shape not in clean:
            clean[shape] = clean_run(folder / f"clean_{len(clean)}", corpus, case.shape)
        began_s = time.monotonic()
        try:
            score = run_case(case, folder / f"case_{number}", corpus, clean.get(shape))
        except Exception as error:  # a case that can't be carried out is a row of the table too
            problem = f"{error!r}"[:2000]
            score = Score(case.name, case.rows, None, None, None, None, None, None, -1, 0, (problem,))
        scores.append(score)
        print(f"{time.monotonic() - began_s:6.1f} s  {case.name}: {'; '.join(score.problems) or 'well'}", flush=True)
        print(line(score), flush=True)
    return scores


def table(scores: list[Score]) -> str:
    """The scores as Markdown, with what they come to."""
    lines = [HEAD, "|---" * HEAD.count(" |") + "|", *map(line, scores)]
    for what, values in (
        ("curves equal", [score.is_curve_equal for score in scores]), ("named", [score.is_named for score in scores]),
    ):
        given = [value for value in values if value is not None]
        lines.append(f"\n{what}: {sum(given)} of {len(given)}")
    return "\n".join(lines)


def line(score: Score) -> str:
    """One row of the table."""
    cells = [
        ", ".join(map(str, score.rows)), score.name, *map(show, (score.detected_s, score.down_s, score.recovered_s)),
        show(score.steps_lost), show(score.is_named), show(score.is_curve_equal), score.exit_code, score.attempts,
    ]
    return f"| {' | '.join(map(str, cells))} |"


def show(value: float | int | bool | None) -> str:
    """A cell: seconds with one decimal, yes or no, `-` for what doesn't apply."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
