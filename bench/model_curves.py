"""Draws the loss of a run for docs/models.md.

Usage: python -m bench.model_curves RUN OUT.png [NAME=VALUE of a level to compare with]
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

from megascale.observe.run_files import read_config, read_metrics
from megascale.observe.units import units_of


def draw(run_folder: Path, out: Path, levels: dict[str, float]) -> None:
    """Loss in training and on validation over the steps, with horizontal lines at `levels`."""
    figure = Figure(figsize=(5.5, 3.2), layout="constrained")
    axes = figure.subplots()
    for kind, name, style in (("train", "training", {"linewidth": 0.6}), ("eval", "validation", {"marker": "o"})):
        lines = list(read_metrics(run_folder, (kind,)))
        axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], label=name, **style)
    for name, level in levels.items():
        axes.axhline(level, linestyle="--", linewidth=0.8, color="gray")
        axes.annotate(name, (1, level), (-4, 3), ("axes fraction", "data"), "offset points", ha="right", fontsize=8)
    axes.set(xlabel="step", ylabel=f"loss, {units_of(read_config(run_folder)).loss}")
    axes.legend()
    figure.savefig(out, dpi=110)


def main() -> None:
    levels = {name: float(value) for name, _, value in (text.partition("=") for text in sys.argv[3:])}
    draw(Path(sys.argv[1]), Path(sys.argv[2]), levels)


if __name__ == "__main__":
    main()
