"""`megascale check --leak`: the leak test on this machine's ranks, or as the rank that torchrun or srun started."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.check import print_check
from launcher.local import CPU_ENVIRONMENT, check_num_ranks, count_gpus, given_ranks, run_local
from launcher.train import default_num_ranks
from megascale.config.load import load_config
from megascale.train.leak_report import check_separates

LEAK_MODULE = "megascale.train.leak"


def check_leak(config_path: Path, overrides: Sequence[str], num_ranks: int | None) -> None:
    """Checks a config, then computes whether documents of one row see each other, and prints what was found.

    Raises:
        MegascaleError: bad input before any rank starts, a leak, or a failed rank.
    """
    arguments = [json.dumps({"config": str(config_path), "overrides": list(overrides)})]
    given = given_ranks(dict(os.environ))
    if given is not None:
        machine = {} if count_gpus() else CPU_ENVIRONMENT
        os.execve(sys.executable, [sys.executable, "-m", LEAK_MODULE, *arguments], os.environ | machine | given)
    config = load_config(config_path, overrides)
    check_separates(config, str(config_path))
    num_ranks = default_num_ranks(config) if num_ranks is None else num_ranks
    check_num_ranks(num_ranks)
    print_check(config_path, overrides, num_ranks)
    run_local(arguments, num_ranks, LEAK_MODULE)
