"""`megascale train`: checks everything that can be checked without ranks, then starts them or becomes one."""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launcher.local import (
    CPU_ENVIRONMENT,
    RANK_MODULE,
    check_num_ranks,
    count_cores,
    count_gpus,
    given_ranks,
    run_local,
)
from megascale.config.derive import Derived, derive
from megascale.config.load import load_config
from megascale.config.resume_rules import check_allowed_keys
from megascale.config.schema import RunConfig
from megascale.data.manifest import check_shard_files, read_tokenizer
from megascale.data.rows import check_batches
from megascale.data.stream import Stream, open_stream, open_validation, plan_stream
from megascale.data.transfer import access_of
from megascale.errors import ConfigError
from megascale.train.start_options import StartOptions

MAX_DEFAULT_CPU_RANKS = 8
NO_OPTIONS = StartOptions()


def start_training(
    config_path: Path, overrides: Sequence[str], num_ranks: int | None, options: StartOptions = NO_OPTIONS
) -> None:
    """Trains the run that a config describes, on this machine's ranks or as the rank that torchrun or srun started.

    Raises:
        MegascaleError: bad input before any rank starts, a failed rank, or a stop that was asked for.
    """
    if options.is_fresh and is_restart(dict(os.environ)):
        print("--fresh was obeyed by the first attempt of this job; this one resumes", file=sys.stderr)
        options = replace(options, is_fresh=False)
    config = load_config(config_path, overrides)
    check_allowed_keys(options.allowed, config)
    arguments = [str(config_path), *overrides, *options.to_arguments()]
    given = given_ranks(dict(os.environ))
    if given is not None:
        machine = {} if count_gpus() else CPU_ENVIRONMENT
        os.execve(sys.executable, [sys.executable, "-m", RANK_MODULE, *arguments], os.environ | machine | given)
    if num_ranks is not None:
        check_num_ranks(num_ranks)
    num_ranks = num_ranks or default_num_ranks(config)
    check_data(config, derive(config, num_ranks, source=str(config_path)))
    run_local(arguments, num_ranks)


def check_data(config: RunConfig, derived: Derived) -> Stream:
    """Refuses corpora that the run can't be trained and validated on, as far as that shows without reading tokens.

    Returns:
        The rows of the run.
    """
    stream, access = open_stream(config, derived), access_of(config.data)
    plan_stream(config, derived, stream)
    check_batches(stream.corpora, derived.batches, config.train.micro_batch_size, derived.dp)
    validation = open_validation(config)
    for corpus in (*stream.corpora, *validation):
        read_tokenizer(corpus.manifest, access)
    for corpus in validation if stream.masks_faults else (*stream.corpora, *validation):
        check_shard_files(corpus.manifest)
    return stream


def is_restart(environment: dict[str, str]) -> bool:
    """Whether torchrun or SLURM started this job before: what it did then must not be thrown away."""
    return any(int(environment.get(name, "0")) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def default_num_ranks(config: RunConfig) -> int:
    """One rank per GPU; without GPUs the most ranks, up to one per core and 8, that the batch can be dealt out to.

    A layout that shares one replica out among more ranks than there are cores gets one replica.
    """
    if count_gpus():
        return count_gpus()
    model_ranks = config.parallel.tp * config.parallel.pp * config.parallel.cp
    for num_ranks in range(max(min(count_cores(), MAX_DEFAULT_CPU_RANKS), model_ranks), 1, -1):
        try:
            derive(config, num_ranks)
            return num_ranks
        except ConfigError:
            continue
    return model_ranks
