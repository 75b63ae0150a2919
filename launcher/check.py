"""`megascale check`: what a config means on so many ranks, computed without torch and without starting anything."""

from collections.abc import Sequence
from pathlib import Path

from launcher.train import check_data, default_num_ranks
from megascale.config.derive import Derived, derive, describe
from megascale.config.load import load_config
from megascale.config.schema import RunConfig
from megascale.config.target import target_len
from megascale.data.location import is_local, local_path
from megascale.data.manifest import INDEX_FILE
from megascale.data.plan import describe_plan
from megascale.data.stream import plan_stream
from megascale.errors import LaunchError
from megascale.model.flops import (
    block_layers,
    layer_costs,
    num_active_parameters,
    num_parameters,
    train_flops_per_token,
)
from megascale.model.memory import GIB, fullest_rank
from megascale.parallel.stages import ideal_idle_fraction, plan_stages


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
    active = f"; a token meets {num_active_parameters(config.model):,} of them" if config.model.moe else ""
    flops = train_flops_per_token(config.model, config.train.seq_len, target_len(config))
    lines = [
        *describe(config, derived),
        *describe_stages(config, derived),
        ("parameters", f"{parameters:,}, {config.model.padded_vocab_size} rows of vocabulary included{active}"),
        ("FLOPs per token", f"{flops:,} forward and backward; {flops * derived.total_tokens:.3g} for the run"),
        ("memory of a rank", describe_memory(config, derived)),
        *describe_corpora(config, derived),
    ]
    for name, value in lines:
        print(f"{name:>18}  {value}")


def describe_stages(config: RunConfig, derived: Derived) -> list[tuple[str, str]]:
    """Blocks and share of the work of each pipeline stage, and how long ranks idle at best; nothing without stages."""
    parallel = config.parallel
    if parallel.pp == 1:
        return []
    costs = layer_costs(config.model, config.train.seq_len, target_len(config))
    stages = plan_stages(costs, derived.num_stages, parallel.stage_layers)
    split = [len(block_layers(config.model).intersection(stage)) for stage in stages]
    shares = [sum(costs[stage.start : stage.stop]) / sum(costs) for stage in stages]
    lines = [("blocks per stage", f"{split} {'by hand' if parallel.stage_layers else 'by cost'}; the dearest stage does"
                                  f" {max(shares) * len(stages):.2f} times its equal share")]
    if derived.num_micro_batches >= derived.num_stages:  # the closed form is that of a full pipeline
        idle = ideal_idle_fraction(parallel.schedule, parallel.pp, parallel.stages_per_rank, derived.num_micro_batches)
        lines.append(("idle at best", f"{idle:.1%} of a step, with equal stages and messages that cost nothing"))
    return lines


def describe_memory(config: RunConfig, derived: Derived) -> str:
    """What the fullest ranks need on a GPU, by closed forms; `megascale.model.memory` says what comes on top."""
    memory = fullest_rank(config, derived)
    parts = {
        "weights": memory.parameters, "gradients": memory.gradients, "optimizer": memory.optimizer,
        "activations": memory.activations, "working": memory.working,
    }
    size, unit = (GIB, "GiB") if memory.total >= GIB else (GIB / 1024, "MiB")
    listed = " + ".join(f"{name} {part / size:.2f}" for name, part in parts.items())
    where = f", on pp rank {memory.pp_rank}" if config.parallel.pp > 1 else ""
    return f"{memory.total / size:.2f} {unit} by formula: {listed}{where}"


def describe_corpora(config: RunConfig, derived: Derived) -> list[tuple[str, str]]:
    """What the run reads of each corpus, or that there is none yet."""
    folders = [local_path(source.folder) for source in config.data.sources.values() if is_local(source.folder)]
    missing = [folder for folder in folders if not (folder / "train" / INDEX_FILE).exists()]
    if missing:
        return [("corpus", f"{folder} is not built yet (megascale data build)") for folder in missing]
    stream = check_data(config, derived)
    lines = [
        ("corpus", f"{corpus.name}: {corpus.manifest.num_tokens:,} tokens in {corpus.num_rows:,} rows of"
                   f" {corpus.manifest.folder}")
        for corpus in stream.corpora
    ]
    return [*lines, *describe_plan(plan_stream(config, derived, stream))]
