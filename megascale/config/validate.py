"""Rules between sections, each small, each with the numbers, the reason and the nearest legal choice."""

from collections.abc import Iterable

from megascale.config.model import divisors
from megascale.config.schema import RunConfig
from megascale.errors import ConfigError


def check_config(config: RunConfig, world_size: int, source: str | None) -> None:
    """Refuses a config that can't run on `world_size` ranks, with every broken rule in one message.

    `source`, when known, is the file that the messages name.

    Raises:
        ConfigError: one line per broken rule.
    """
    rules = (_sequence_rules, _batch_rules, _schedule_rules, _tensor_parallel_rules, _layout_rules)
    problems = [problem for rule in rules for problem in rule(config, world_size)]
    if problems:
        raise ConfigError("\n".join(f"{source}: {problem}" if source else problem for problem in problems))


def _sequence_rules(config: RunConfig, world_size: int) -> Iterable[str]:
    seq_len, max_seq_len = config.train.seq_len, config.model.max_seq_len
    if seq_len > max_seq_len:
        yield (
            f"train.seq_len = {seq_len} is longer than model.max_seq_len = {max_seq_len}, the positions that the model"
            f" has; use at most {max_seq_len}, or raise model.max_seq_len"
        )


def _batch_rules(config: RunConfig, world_size: int) -> Iterable[str]:
    parallel, train = config.parallel, config.train
    dp = max(1, world_size // (parallel.tp * parallel.pp * parallel.cp))
    unit = train.micro_batch_size * train.seq_len * dp
    if train.global_batch_tokens % unit:
        below = train.global_batch_tokens // unit * unit
        choices = " or ".join(str(tokens) for tokens in (below, below + unit) if tokens)
        yield (
            f"train.global_batch_tokens = {train.global_batch_tokens} is not a multiple of micro_batch_size"
            f" {train.micro_batch_size} x seq_len {train.seq_len} x dp {dp} = {unit}; the nearest are {choices}"
        )


def _schedule_rules(config: RunConfig, world_size: int) -> Iterable[str]:
    optimizer = config.optimizer
    horizon_steps = optimizer.horizon_steps or config.train.max_steps
    if optimizer.warmup_steps >= horizon_steps:
        yield (
            f"optimizer.warmup_steps = {optimizer.warmup_steps} leaves nothing of the schedule's {horizon_steps} steps;"
            f" use at most {horizon_steps - 1}"
        )


def _tensor_parallel_rules(config: RunConfig, world_size: int) -> Iterable[str]:
    tp, model = config.parallel.tp, config.model
    for name, size in (("num_heads", model.num_heads), ("d_ff", model.ffn_dim)):
        if size % tp:
            yield f"parallel.tp = {tp} does not divide model.{name} = {size}; use one of {divisors(size)}"


def _layout_rules(config: RunConfig, world_size: int) -> Iterable[str]:
    parallel = config.parallel
    model_ranks = parallel.tp * parallel.pp * parallel.cp
    if world_size % model_ranks:
        below = world_size // model_ranks * model_ranks
        choices = " or ".join(str(ranks) for ranks in (below, below + model_ranks) if ranks)
        yield (
            f"{world_size} ranks can't hold whole replicas of tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp} ="
            f" {model_ranks} ranks; use {choices} ranks"
        )
    if parallel.pp > 1 and parallel.zero_stage > 1:
        yield (
            f"parallel.zero_stage = {parallel.zero_stage} with parallel.pp = {parallel.pp}: a pipeline needs whole"
            " gradients until its last micro-batch, so only ZeRO 0 and 1 go with it; use zero_stage 1"
        )
    if model_ranks > 1:
        yield (
            f"tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp}: this version of megascale shares a model out by"
            " ZeRO alone; use tp = pp = cp = 1"
        )
