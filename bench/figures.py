"""What every bench prints: where and with what it ran, paired ratios as quartiles, and a Markdown table."""

import datetime
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from launcher.local import count_cores


def describe_machine(packages: Sequence[str]) -> str:
    """Date, processor and versions, in one line."""
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    today = datetime.date.today().isoformat()
    return f"{today}; {processor_name()}, {count_cores()} cores; Python {platform.python_version()}, {versions}"


def processor_name() -> str:
    """The processor as /proc/cpuinfo names it, or its architecture on other systems."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def show_ratios(ratios: Iterable[float]) -> str:
    """Median of paired ratios, with the first and third quartile."""
    first, median, third = np.percentile(list(ratios), [25, 50, 75])
    return f"{median:.3f} ({first:.3f} to {third:.3f})"


def show_row(cells: Iterable[object]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def show_head(columns: Sequence[str]) -> str:
    """The two first lines of a Markdown table."""
    return f"{show_row(columns)}\n{show_row(['---'] * len(columns))}"
