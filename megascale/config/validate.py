"""Rules between sections, each small, each with the numbers, the reason and the nearest legal choice."""

from collections.abc import Iterable

from megascale.config.bert_rules import bert_rules
from megascale.config.layout_rules import (
    batch_sizes,
    batch_unit,
    describe_proposals,
    layout_problems,
    nearest_multiples,
)
from megascale.config.moe_rules import moe_rules
from megascale.config.palm_rules import palm_rules
from megascale.config.schema import RunConfig
from megascale.config.t5_rules import pair_rules
from megascale.config.vit_rules import vit_rules
from megascale.errors import ConfigError


def check_config(config: RunConfig, world_size: int, source: str | None) -> None:
    """Refuses a config that can't run on `world_size` ranks, with every broken rule in one message.

    `source`, when known, is the file that the messages name.

    Raises:
        ConfigError: one line per broken rule, and the nearest legal layouts where the layout is at fault.
    """
    rules = (_length_rules, _batch_rules, _warmup_rules, bert_rules, palm_rules, moe_rules, pair_rules, vit_rules)
    problems = [problem for rule in rules for problem in rule(config, world_size)]
    if layout := layout_problems(config, world_size):
        problems += [*layout, describe_proposals(config, world_size)]
    if problems:
        raise ConfigError("\n".join(f"{source}: {problem}" if source else problem for problem in problems))


def _length_rules(config: RunConfig, world_size: int) -> Iterable[str]:
    seq_len, max_seq_len = config.train.seq_len, config.model.max_seq_len
    if seq_len > max_seq_len:
        yield (
            f"train.seq_len = {seq_len} is longer than model.max_seq_len = {max_seq_len}, the positions that the model"
            f" has; use at most {max_seq_len}, or raise model.max_seq_len"
        )


def _batch_rules(config: RunConfig, world_size: int) -> Iterable[str]:
    parallel, train = config.parallel, config.train
    unit = batch_unit(config, world_size)
    if unit is None:
        return  # without whole replicas there is no batch to deal out, and the layout's own rule says so
    dp = world_size // (parallel.tp * parallel.pp * parallel.cp)
    for key, tokens in batch_sizes(train).items():
        if tokens % unit:
            yield (
                f"train.{key} = {tokens} is not a multiple of micro_batch_size {train.micro_batch_size} x seq_len"
                f" {train.seq_len} x dp {dp} = {unit}; the nearest are {nearest_multiples(tokens, unit)}"
            )


def _warmup_rules(config: RunConfig, world_size: int) -> Iterable[str]:
    optimizer = config.optimizer
    horizon_steps = optimizer.horizon_steps or config.train.max_steps
    if optimizer.warmup_steps >= horizon_steps:
        yield (
            f"optimizer.warmup_steps = {optimizer.warmup_steps} leaves nothing of the schedule's {horizon_steps} steps;"
            f" use at most {horizon_steps - 1}"
        )
