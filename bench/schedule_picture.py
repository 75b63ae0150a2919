"""Draws traced steps of pipeline schedules: a row for each rank, a box for all that it does, white where it idles."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from bench.schedule_trace import Box, idle_fraction

COLORS = {"F": "#3b6fd4", "B": "#3f9a6d", "I": "#5fb98c", "W": "#e0a13a"}
NAMES = {"F": "forward", "B": "backward", "I": "inputs' gradient", "W": "weights' gradient"}
SECOND_STAGE_ALPHA = 0.62
"""Stages after a rank's first are drawn paler."""


def draw_schedules(traces: dict[str, Sequence[Sequence[Box]]], path: Path) -> Path:
    """Draws one panel a schedule, all on one scale of time, into a PNG or SVG file, as its suffix says."""
    matplotlib.rcParams["svg.hashsalt"] = "megascale"  # the same picture gives the same file
    pp = max(map(len, traces.values()))
    figure = Figure(figsize=(11, len(traces) * (0.55 + 0.26 * pp)), layout="constrained")
    panels = figure.subplots(len(traces), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (schedule, boxes) in zip(panels, traces.items(), strict=True):
        draw_panel(panel, boxes)
        panel.set_title(f"{schedule}: idle {idle_fraction(boxes):.1%}", loc="left", fontsize=10)
    panels[-1].set_xlabel("time from the start of the step, ms")
    figure.legend(
        handles=[Patch(color=COLORS[kind], label=name) for kind, name in NAMES.items()], loc="outside lower center",
        ncols=len(NAMES), frameon=False, fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, facecolor="white", metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def draw_panel(panel: Axes, boxes: Sequence[Sequence[Box]]) -> None:
    """One schedule: ranks from top to bottom, the number of the micro-batch in each box."""
    origin = min(box.start for row in boxes for box in row)
    for rank, row in enumerate(boxes):
        first_stage = min(box.stage for box in row)
        for box in row:
            left, width = 1e3 * (box.start - origin), 1e3 * (box.end - box.start)
            alpha = 1.0 if box.stage == first_stage else SECOND_STAGE_ALPHA
            panel.add_patch(
                Rectangle((left, rank - 0.42), width, 0.84, facecolor=COLORS[box.kind], alpha=alpha, edgecolor="white",
                          linewidth=0.5)
            )
            panel.text(left + width / 2, rank, box.micro_batch, ha="center", va="center", fontsize=5.5, color="white")
    end = max(box.end for row in boxes for box in row)
    panel.set_xlim(0, max(panel.get_xlim()[1], 1e3 * (end - origin)))
    panel.set_ylim(len(boxes) - 0.5, -0.5)
    panel.set_yticks(range(len(boxes)), [f"rank {rank}" for rank in range(len(boxes))], fontsize=8)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(axis="y", length=0)
