"""A rank that keeps a ledger of what it trained on and dies at a chosen place.

The file named by MEGASCALE_TEST_PLAN holds JSON: {"ledger": folder, "rank": r, "step": k, "phase": name}; without
"phase" nothing happens to it. Phases: forward, backward, reduce, update, evaluate, save, commit, staged, log.
"""

import json
import os
import signal
import sys
from pathlib import Path

from megascale.checkpoint import writer
from megascale.checkpoint.save import Saver
from megascale.engine import zero01
from megascale.engine.flat_zero import FlatZeroOptimizer
from megascale.engine.micro_batches import MicroBatchRunner
from megascale.observe.logger import Logger
from megascale.train import rank

PLAN = json.loads(Path(os.environ["MEGASCALE_TEST_PLAN"]).read_text())
RANK = int(os.environ["RANK"])
position = {"step": -1}


def die(phase: str) -> None:
    """Ends this process as a power cut would, when the plan says so."""
    if PLAN.get("phase") == phase and PLAN["rank"] == RANK and PLAN["step"] == position["step"]:
        os.kill(os.getpid(), signal.SIGKILL)


def dying(owner, name: str, phase: str, *, after: bool = False) -> None:
    """Makes a function or method die before, or after, its work."""
    original = getattr(owner, name)

    def wrapped(*arguments, **options):
        if not after:
            die(phase)
        result = original(*arguments, **options)
        if after:
            die(phase)
        return result

    setattr(owner, name, wrapped)


def keep_ledger() -> None:
    """Notes rows and a hash of the tokens of each step that this rank completed."""
    original = zero01.WholeGradientEngine.train_step

    def train_step(self, micro_batches, *, step, num_tokens, learning_rate):
        position["step"] = step
        output = original(self, micro_batches, step=step, num_tokens=num_tokens, learning_rate=learning_rate)
        rows = [row for batch in micro_batches for row in batch.row_numbers_B.tolist()]
        tokens = [hash(tuple(batch.tokens_BT.flatten().tolist())) for batch in micro_batches]
        with open(Path(PLAN["ledger"]) / f"rank_{RANK}.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "rows": rows, "tokens": tokens}) + "\n")
        return output

    zero01.WholeGradientEngine.train_step = train_step


def main() -> int:
    keep_ledger()
    dying(MicroBatchRunner, "run", "forward")
    dying(MicroBatchRunner, "run", "backward", after=True)
    dying(FlatZeroOptimizer, "reduce_gradients", "reduce", after=True)
    dying(FlatZeroOptimizer, "update_lp_params", "update")
    dying(zero01.WholeGradientEngine, "evaluate", "evaluate")
    dying(writer, "write_part", "save", after=True)  # in the rank itself, with checkpoint.asynchronous=false
    dying(writer, "commit", "commit")
    dying(Saver, "start", "staged", after=True)
    dying(Logger, "log_train", "log")
    return rank.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
