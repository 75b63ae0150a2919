"""How `make test` spreads the test files over processes (`--dist loadfile`): long ones first."""

import os
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
LONGEST_FIRST = ("slurm", "fault", "e2e", "dist")


def pytest_configure(config: pytest.Config) -> None:
    """One thread for each process, and for each rank that a test starts: they are more than the cores already."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """As many processes as cores: tests of 8 ranks in more of them than that starve each other past their limits."""
    return len(os.sched_getaffinity(0))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests come first, so that all processes end at about the same time."""
    items.sort(key=lambda item: _turn(item.path.relative_to(TESTS).parts[0]))


def _turn(folder: str) -> int:
    return LONGEST_FIRST.index(folder) if folder in LONGEST_FIRST else len(LONGEST_FIRST)
