"""Ranks forked from one process that has imported torch and DeepSpeed: seconds less of a core for each.

`multiprocessing`'s fork server imports `warm_imports` once. A fork lacks what a fresh process has: a hash seed of its
own. Ranks of the command line's tests are fresh processes.
"""

import atexit
import faulthandler
import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

WARM = multiprocessing.get_context("forkserver")
WARM.set_forkserver_preload(["tests.support.warm_imports"])


def start_rank(module: str, arguments: Sequence[str], environment: Mapping[str, str], out: Path, err: Path):
    """Starts `python -m module ARGUMENTS` as a fork; returns its `multiprocessing.Process`."""
    process = WARM.Process(target=_run, args=(module, list(arguments), dict(environment), out, err))
    process.start()
    return process


def _run(module: str, arguments: list[str], environment: dict[str, str], out: Path, err: Path) -> None:
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(environment)
    faulthandler.enable()
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # multiprocessing's children leave without
        sys.stdout.flush()
        sys.stderr.flush()
