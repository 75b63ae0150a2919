"""A rank that ends before torch is there, with message and exit code of the plan, negative for a signal."""

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    plan = json.loads(Path(os.environ["MEGASCALE_TEST_PLAN"]).read_text())
    print(plan["message"], file=sys.stderr, flush=True)
    if plan["code"] < 0:
        os.kill(os.getpid(), -plan["code"])
    os._exit(plan["code"])
