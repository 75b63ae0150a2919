"""Draws the curves of a run as SVG or PNG, from the lines of its `metrics.jsonl`."""

import io
import re
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megascale.errors import DataError
from megascale.observe.run_files import BASELINES_FILE, METRICS_FILE, read_config, read_json, read_metrics
from megascale.observe.units import Units, units_of

COLORS = {"train": "#3b6fd4", "eval": "#d9562b", "unigram": "#8a8f98", "bigram": "#8a8f98", "trigram": "#3f9a6d"}
"""Readable on white and on black, since the report follows the reader's choice of light or dark."""

_DASHES = {"unigram": ":", "bigram": "--", "trigram": "-."}
_MAX_POINTS = 2000


def draw_loss_curve(run_folder: Path, path: Path) -> Path:
    """Draws training and validation loss and the baselines into a PNG or SVG file, as its suffix says.

    Raises:
        DataError: the run has no metrics to draw.
    """
    lines = list(read_metrics(run_folder))
    if not lines:
        raise DataError(f"{run_folder / METRICS_FILE} has no metrics to draw; train the run for a step or more")
    units = units_of(read_config(run_folder))
    figure = loss_figure(lines, read_json(run_folder / BASELINES_FILE) or [], units)
    figure.savefig(path, dpi=160, facecolor="white", bbox_inches="tight")
    return path


def loss_figure(lines: list[dict], fits: list[dict], units: Units) -> Figure:
    """The loss of each step (light), its running mean, the validation points, and the n-gram baselines."""
    figure, axes = _build_axes("step", f"loss, {units.loss}", height=4.2)
    steps, losses = series(lines, "train", "loss")
    if len(steps) > 20:
        axes.plot(*_thin(steps, losses), color=COLORS["train"], alpha=0.25, linewidth=0.8)
        axes.plot(*_thin(steps, running_mean(losses, len(losses) // 50 + 1)), color=COLORS["train"], label="training")
    else:
        axes.plot(steps, losses, color=COLORS["train"], marker=".", label="training")
    axes.plot(*series(lines, "eval", "loss"), color=COLORS["eval"], marker="o", markersize=3.5, label="validation")
    for name in sorted({name for fit in fits for name in fit["losses"]}, reverse=True):
        known = [(fit["step"], fit["losses"][name]) for fit in fits if name in fit["losses"]]
        _draw_baseline(axes, name, sorted(known))
    _limit_to_interest(axes, losses)
    axes.legend(frameon=False, labelcolor=_INK)
    return figure


def metric_figure(lines: list[dict], name: str, label: str, is_log: bool = False) -> Figure:
    """One metric of the training steps."""
    figure, axes = _build_axes("step", label, height=2.4)
    axes.plot(*_thin(*series(lines, "train", name)), color=COLORS["train"], linewidth=1.1)
    if is_log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    return figure


def corpora_figure(lines: list[dict], units: Units) -> Figure:
    """The validation loss of each corpus of a blend."""
    figure, axes = _build_axes("step", f"validation loss, {units.loss}", height=2.8)
    for name in sorted({name for line in lines for name in line.get("corpora") or {}}):
        found = ((line["step"], line["corpora"][name]["loss"]) for line in lines if name in (line.get("corpora") or {}))
        points = sorted((step, loss) for step, loss in found if loss is not None)
        axes.plot(*(zip(*points, strict=True) if points else ((), ())), marker="o", markersize=3.5, label=name)
    axes.legend(frameon=False, labelcolor=_INK)
    return figure


def figures_figure(lines: list[dict], name: str) -> Figure:
    """One of the figures that a model tells of itself, such as `load_max`, a line for each part that has it."""
    figure, axes = _build_axes("step", name.replace("_", " "), height=2.4)
    known = [line for line in lines if line.get("figures")]
    for full_name in sorted({full for line in known for full in line["figures"] if full.endswith(f"/{name}")}):
        points = sorted((line["step"], line["figures"][full_name]) for line in known if full_name in line["figures"])
        axes.plot(*_thin(*map(list, zip(*points, strict=True))), linewidth=1.0)
    return figure


def series(lines: list[dict], kind: str, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, ordered by step, where it has a value."""
    points = sorted((line["step"], line[name]) for line in lines if line["kind"] == kind and line.get(name) is not None)
    return [step for step, _ in points], [value for _, value in points]


def running_mean(values: list[float], width: int) -> list[float]:
    """Mean of each value and up to `width - 1` before it: what a point shows was known when it was logged."""
    means, total = [], 0.0
    for place, value in enumerate(values):
        total += value - (values[place - width] if place >= width else 0.0)
        means.append(total / min(place + 1, width))
    return means


def to_inline_svg(figure: Figure, description: str) -> str:
    """Renders a figure as an SVG element that scales with the page and takes its ink from the page's text color."""
    buffer = io.StringIO()
    figure.savefig(
        buffer,
        format="svg",
        transparent=True,
        bbox_inches="tight",
        metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
    )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r' (?:width|height)="[0-9.]+pt"', "", svg, count=2)
    # Ids are the same in each figure, and a page with several would resolve them all to the first.
    prefix = "f" + re.sub(r"\W+", "-", description) + "-"
    svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', lambda match: match[1] + prefix, svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)


_INK = "#123456"
"""A color that nothing else has: stands for the page's text color until the SVG is inlined."""


def _build_axes(x_label: str, y_label: str, height: float) -> tuple[Figure, Axes]:
    # Figure instead of pyplot: no global state, no window system.
    figure = Figure(figsize=(8.0, height))
    axes = figure.add_subplot()
    axes.set_xlabel(x_label, color=_INK)
    axes.set_ylabel(y_label, color=_INK)
    axes.tick_params(which="both", colors=_INK, length=3)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.margins(x=0.01)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_INK)
    return figure, axes


def _draw_baseline(axes: Axes, name: str, fits: list[tuple[int, float]]) -> None:
    """A level where there is one fit; otherwise a line through the fits, each at the step that had read its tokens."""
    style = {"color": COLORS.get(name, "#8a8f98"), "linestyle": _DASHES.get(name, "--"), "linewidth": 1.3}
    label = f"{name} {fits[-1][1]:.3f}"
    if len(fits) == 1:
        axes.axhline(fits[0][1], label=label, **style)
    else:
        axes.plot(*zip(*fits, strict=True), label=label, **style)


def _limit_to_interest(axes: Axes, losses: list[float]) -> None:
    """Cuts spikes off above the losses of the start, so that one bad step doesn't flatten the curve."""
    if losses:
        axes.set_ylim(top=min(axes.get_ylim()[1], 1.1 * max(losses[: max(1, len(losses) // 20)])))


def _thin(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """At most about 2000 points: no screen shows more, and the page stays small."""
    stride = len(steps) // _MAX_POINTS + 1
    return steps[::stride], values[::stride]
