"""How much longer our optimizer step takes than a plain PyTorch loop's on the same model: `python -m bench.step_overhead`.

On one rank the other loop is plain PyTorch, on several it is DistributedDataParallel. Both train side by side in one
process, a step of each in turn, so whatever else the machine does meets both: the figure is the median of the paired
ratios. The same loop against a second copy of itself shows the noise.
"""

import argparse
import json

from bench.figures import describe_machine, show_head
from bench.step_rank import COLUMNS, SHAPES
from launcher.local import run_local


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--zero-stages", nargs="+", type=int, choices=range(4), default=[1])
    parser.add_argument("--seconds", type=float, default=20.0, help="time measured for each row of the table")
    options = parser.parse_args()
    print(describe_machine(["torch", "deepspeed"]))
    print(f"1 thread per rank, {options.seconds:g} s per row; ratios: median (first to third quartile)\n")
    print(show_head(COLUMNS), flush=True)
    for num_ranks in options.ranks:
        run_local([json.dumps(vars(options))], num_ranks, "bench.step_rank")


if __name__ == "__main__":
    main()
