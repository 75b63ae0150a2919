"""What saving and loading cost, and what a training step waits for: `python -m bench.checkpoint`.

Ranks hold the state of a model, fp32 weights and two moments, as ZeRO cuts it. Each round saves it in turns: by our
asynchronous saver, by our synchronous one, by `torch.distributed.checkpoint.async_save` (in a thread, and in a
process), and by plain writes of the same bytes with fsync; then verifies and loads it, against plain reads of the file.
Blocked is the time until the rank may go on, the slowest rank's; saved, the time until the checkpoint counts. No
training runs beside it, so `saved` is the best case.
"""

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass

from bench.figures import describe_machine
from launcher.local import run_local


@dataclass(frozen=True)
class Options:
    """How much is saved, by how many ranks, how often, and where."""

    millions: int
    ranks: int
    rounds: int
    folder: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=int, default=24, help="parameters of all ranks together, in millions")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    print(describe_machine(("torch", "numpy", "safetensors")))
    with tempfile.TemporaryDirectory() as folder:
        options = Options(**vars(arguments), folder=folder)
        run_local([json.dumps(asdict(options))], options.ranks, "bench.checkpoint_rank")


if __name__ == "__main__":
    main()
