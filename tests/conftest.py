"""How `make test` spreads the tests over processes: a file stays in one, the SLURM tests share theirs, long ones first."""

import os
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
LONGEST_FIRST = ("slurm", "fault", "e2e", "dist")
ALONE = ("slurm",)
"""Folders whose files share what is made once, and so one process."""


def pytest_configure(config: pytest.Config) -> None:
    """One thread for each process, and for each rank that a test starts: they are more than the cores already."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process more than cores, since most tests of the folders above wait for ranks, and for time to pass."""
    return len(os.sched_getaffinity(0)) + 1


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Names the group of each test, and puts long ones first, so that all processes end at about the same time."""
    items.sort(key=lambda item: _turn(item.path))
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        item.add_marker(pytest.mark.xdist_group(folder if folder in ALONE else str(item.path)))


def _turn(path: Path) -> int:
    folder = path.relative_to(TESTS).parts[0]
    return LONGEST_FIRST.index(folder) if folder in LONGEST_FIRST else len(LONGEST_FIRST)
