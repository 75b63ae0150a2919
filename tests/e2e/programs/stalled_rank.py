"""A rank whose data stops coming: on one rank the thread that reads ahead hangs in a chosen step, for ever.

The file named by MEGASCALE_TEST_PLAN holds JSON: {"folder": folder, "rank": r, "step": k}. A rank leaves the file
`paused_<rank>` in the folder: at once, or, where data stops, when it waits for it.
"""

import json
import os
import sys
import threading
from pathlib import Path

from megascale.data.loader import Loader
from megascale.data.prefetch import Prefetched
from megascale.train import rank

PLAN = json.loads(Path(os.environ["MEGASCALE_TEST_PLAN"]).read_text())
MARK = Path(PLAN["folder"]) / f"paused_{os.environ['RANK']}"


def main() -> None:
    if os.environ["RANK"] == str(PLAN["rank"]):
        stall()
    else:
        MARK.touch()
    rank.main(sys.argv[1:])


def stall() -> None:
    """The reading thread stands still at the step; the rank marks that it waits."""
    make_steps, take = Loader._make_steps, Prefetched.take

    def hanging(loader, step):
        for number, data in enumerate(make_steps(loader, step), step):
            if number == PLAN["step"]:
                threading.Event().wait()
            yield data

    def marking(steps, timeout_s):
        item = take(steps, timeout_s)
        if item is None:
            MARK.touch()
        return item

    Loader._make_steps, Prefetched.take = hanging, marking


if __name__ == "__main__":
    main()
