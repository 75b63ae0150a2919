"""`megascale train`: checks everything that can be checked without ranks, then starts them or becomes one."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.local import check_num_ranks, count_cores, count_gpus, given_ranks, run_local
from megascale.config.derive import derive
from megascale.config.load import load_config
from megascale.config.schema import RunConfig
from megascale.data.manifest import check_corpus, load_manifest
from megascale.errors import ConfigError

MAX_DEFAULT_CPU_RANKS = 8


def start_training(config_path: Path, overrides: Sequence[str], num_ranks: int | None, is_fresh: bool) -> None:
    """Trains the run that a config describes, on this machine's ranks or as the rank that torchrun or srun started.

    Raises:
        MegascaleError: bad input before any rank starts, a failed rank, or a stop that was asked for.
    """
    arguments = [str(config_path), *overrides, *(["--fresh"] if is_fresh else [])]
    given = given_ranks(dict(os.environ))
    if given is not None:
        os.execve(sys.executable, [sys.executable, "-m", "megascale.train.rank", *arguments], os.environ | given)
    config = load_config(config_path, overrides)
    if num_ranks is not None:
        check_num_ranks(num_ranks)
    num_ranks = num_ranks or default_num_ranks(config)
    derive(config, num_ranks, source=str(config_path))
    for split in ("train", "validation"):
        check_corpus(load_manifest(config.data.folder, split), config.model.vocab_size)
    run_local(arguments, num_ranks)


def default_num_ranks(config: RunConfig) -> int:
    """One rank per GPU; without GPUs the most ranks, up to one per core and 8, that the batch can be dealt out to."""
    if count_gpus():
        return count_gpus()
    for num_ranks in range(min(count_cores(), MAX_DEFAULT_CPU_RANKS), 1, -1):
        try:
            derive(config, num_ranks)
            return num_ranks
        except ConfigError:
            continue
    return 1
