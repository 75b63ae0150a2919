"""One request of a command, served by a process of its own, so that the launcher needs no torch."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from launcher.local import CPU_ENVIRONMENT, count_cores, count_gpus
from megascale.errors import RankFailedError

FRUGAL_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}
"""glibc gives the memory of a tensor back with the tensor, for what goes through a model one tensor at a time. Training
ranks keep it, for speed."""


def run_request(
    module: str, request: dict[str, Any], environment: Mapping[str, str] | None = None, *, capture: bool = False
) -> str:
    """Runs a module that takes one request as JSON; what it prints is printed, or returned when `capture` is set.

    Args:
        environment: variables that it gets besides this process's.

    Raises:
        RankFailedError: it failed, for the reason in its message and with its exit code.
    """
    machine = {} if count_gpus() else CPU_ENVIRONMENT
    finished = subprocess.run(
        [sys.executable, "-m", module, json.dumps(request)],
        env={"OMP_NUM_THREADS": str(count_cores())} | os.environ | machine | (environment or {}),
        stdout=subprocess.PIPE if capture else None, stderr=subprocess.PIPE, encoding="utf-8", errors="replace",
        check=False,
    )
    if finished.returncode:
        _, marker, message = f"\n{finished.stderr}".rpartition("\nerror: ")
        fault = RankFailedError((message if marker else finished.stderr).strip() or f"{module} was killed")
        fault.exit_code = finished.returncode if finished.returncode > 0 else fault.exit_code
        raise fault
    return finished.stdout or ""
