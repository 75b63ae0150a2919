"""How much longer our optimizer step takes than a plain PyTorch loop's: `python -m bench.step_overhead`.

On one rank the other loop is plain PyTorch, on several it is DistributedDataParallel. Both train equal models in one
process, a step of each in turn, so whatever else the machine does meets both: the figure is the median of the paired
ratios. The other loop against a second copy of itself shows the noise.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from bench.figures import describe_machine, show_head
from launcher.local import run_local
from megascale.config.load import load_config
from megascale.config.model import ModelConfig

COLUMNS = ("ranks", "model", "parameters", "dtype", "ZeRO", "other loop, ms", "ours / other", "other / other", "steps")


@dataclass(frozen=True)
class Shape:
    """A model and this rank's batch of a step."""

    model: ModelConfig
    rows: int
    seq_len: int


QUICKSTART, QUICKSTART_CONFIG = "quickstart", Path(__file__).parents[1] / "configs" / "quickstart.yaml"
SHAPES = {
    "d64": Shape(ModelConfig(
        family="llama", num_layers=2, d_model=64, num_heads=2, vocab_size=1024, max_seq_len=128), rows=4, seq_len=128),
    "d256": Shape(ModelConfig(
        family="gpt2", num_layers=6, d_model=256, num_heads=4, vocab_size=8192, max_seq_len=256), rows=4, seq_len=256),
}


def shape_of(name: str) -> Shape:
    """One of the shapes above, or the quickstart's."""
    if name != QUICKSTART:
        return SHAPES[name]
    config = load_config(QUICKSTART_CONFIG)
    return Shape(config.model, config.train.micro_batch_size, config.train.seq_len)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--shapes", nargs="+", choices=(QUICKSTART, *SHAPES), default=["d64", QUICKSTART, "d256"])
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
