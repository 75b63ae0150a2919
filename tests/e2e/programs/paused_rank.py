"""A rank that pauses at a chosen place, so that a test can do something just then.

The file named by MEGASCALE_TEST_PLAN holds JSON: {"folder": folder, "phase": name, "step": k}. A rank that gets there
leaves the file `paused_<rank>` in the folder and goes on once there is a file `go`. Phases: import (before anything of
megascale is loaded), setup, forward, evaluate, save; for the first two the step must be 0.
"""

import json
import os
import sys
import time
from pathlib import Path

PLAN = json.loads(Path(os.environ["MEGASCALE_TEST_PLAN"]).read_text())
FOLDER = Path(PLAN["folder"])
LONGEST_S = 60.0


def pause(phase: str, step: int) -> None:
    """Waits here when the plan says so; signals don't end the wait."""
    if (phase, step) != (PLAN["phase"], PLAN["step"]):
        return
    (FOLDER / f"paused_{os.environ['RANK']}").touch()
    deadline = time.monotonic() + LONGEST_S
    while not (FOLDER / "go").exists() and time.monotonic() < deadline:
        time.sleep(0.02)


def pausing(owner, name: str, phase: str, step_of) -> None:
    """Makes a function pause before its work; `step_of` finds the step among its arguments."""
    original = getattr(owner, name)

    def wrapped(*arguments, **options):
        pause(phase, step_of(*arguments, **options))
        return original(*arguments, **options)

    setattr(owner, name, wrapped)


def main() -> None:
    pause("import", 0)
    from megascale.engine.micro_batches import MicroBatchRunner
    from megascale.train import loop, rank, setup

    pausing(setup, "build_run_engine", "setup", lambda *_, **options: 0)
    pausing(MicroBatchRunner, "run", "forward", lambda runner, micro_batches, step, scale: step)
    pausing(loop, "evaluate", "evaluate", lambda run, step, max_rows: step)
    pausing(loop, "save", "save", lambda run, state, **options: state.step)
    rank.main(sys.argv[1:])


if __name__ == "__main__":
    main()
