"""Our step of nanoGPT's character-level model against a plain PyTorch loop of the same: `python -m bench.nanogpt`.

The other loop has a model of its own, written as nanoGPT's is (`bench.nanogpt_rank`), with the same weights. Both train
in one process, a step of each in turn, and the figures are medians of the paired ratios. The other loop runs as nanoGPT
does, whose AdamW isn't the fused one on a CPU, and once more with the fused one, which ours has. The losses of the
first steps must agree, or it stops.
"""

import argparse
import json
from pathlib import Path

from bench.figures import describe_machine, show_head
from bench.step_overhead import Shape
from launcher.local import run_local
from megascale.config.load import load_config

CONFIG = Path(__file__).parents[1] / "configs" / "nanogpt_char_cpu.yaml"
COLUMNS = ("threads", "parameters", "rows", "positions", "other loop, ms", "ours / other", "ours / fused",
           "fused / other", "steps")


def shape_of_config() -> Shape:
    """The model and the batch of the CPU variant."""
    config = load_config(CONFIG)
    return Shape(config.model, config.train.micro_batch_size, config.train.seq_len)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--seconds", type=float, default=30.0, help="time measured for each row of the table")
    options = parser.parse_args()
    print(describe_machine(["torch"]))
    print(f"{options.seconds:g} s per row; ratios: median (first to third quartile)\n")
    print(show_head(COLUMNS), flush=True)
    run_local([json.dumps(vars(options))], 1, "bench.nanogpt_rank")


if __name__ == "__main__":
    main()
