"""`megascale check`: what a config means on so many ranks, computed without torch and without starting anything."""

from collections.abc import Sequence
from pathlib import Path

from launcher.train import check_data, default_num_ranks
from megascale.config.derive import Derived, derive, describe
from megascale.config.load import load_config
from megascale.config.schema import RunConfig
from megascale.data.manifest import INDEX_FILE
from megascale.errors import LaunchError
from megascale.model.flops import num_parameters, train_flops_per_token


def print_check(config_path: Path, overrides: Sequence[str], num_ranks: int | None) -> None:
    """Prints the derived numbers with their factors, or raises the first thing that is wrong.

    Raises:
        ConfigError, DataError, LaunchError: as `megascale train` would.
    """
    config = load_config(config_path, overrides)
    if num_ranks is not None and num_ranks < 1:
        raise LaunchError(f"--nproc {num_ranks}: use 1 or more")
    derived = derive(config, num_ranks or default_num_ranks(config), source=str(config_path))
    parameters = num_parameters(config.model)
    flops = train_flops_per_token(config.model, config.train.seq_len)
    lines = [
        *describe(config, derived),
        ("parameters", f"{parameters:,}, {config.model.padded_vocab_size} rows of vocabulary included"),
        ("FLOPs per token", f"{flops:,} forward and backward; {flops * derived.total_tokens:.3g} for the run"),
        ("corpus", describe_corpus(config, derived)),
    ]
    for name, value in lines:
        print(f"{name:>18}  {value}")


def describe_corpus(config: RunConfig, derived: Derived) -> str:
    """How often the run reads the corpus, or that there is none yet."""
    folder = Path(config.data.folder)
    if not (folder / "train" / INDEX_FILE).exists():
        return f"{folder} is not built yet (megascale data build)"
    train_rows = check_data(config, derived)
    epochs = config.train.max_steps * derived.rows_per_step / train_rows.num_rows
    return (
        f"{train_rows.manifest.num_tokens:,} tokens in {train_rows.num_rows:,} rows of {folder}; the run reads them"
        f" {epochs:.2f} times"
    )
