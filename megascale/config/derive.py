"""Every number that follows from a config and a world size, computed once and printed with its factors."""

from dataclasses import dataclass

from megascale.config.schema import RunConfig
from megascale.config.validate import check_config


@dataclass(frozen=True)
class Derived:
    """What the config and the number of ranks imply.

    Attributes:
        world_size: ranks of the run.
        dp: replicas of the model.
        rows_per_step: rows of one optimizer step over all replicas.
        num_micro_batches: forward passes of one replica in one step.
        tokens_per_step: input tokens of one step over all replicas.
        total_tokens: input tokens of the whole run.
        horizon_steps: step at which the learning-rate schedule ends.
    """

    world_size: int
    dp: int
    rows_per_step: int
    num_micro_batches: int
    tokens_per_step: int
    total_tokens: int
    horizon_steps: int


def derive(config: RunConfig, world_size: int, source: str | None = None) -> Derived:
    """Checks the config for `world_size` ranks and computes what follows from it; `source` names it in messages.

    Raises:
        ConfigError: the config can't run on that many ranks.
    """
    check_config(config, world_size, source)
    parallel, train = config.parallel, config.train
    dp = world_size // (parallel.tp * parallel.pp * parallel.cp)
    rows_per_step = train.global_batch_tokens // train.seq_len
    return Derived(
        world_size=world_size,
        dp=dp,
        rows_per_step=rows_per_step,
        num_micro_batches=rows_per_step // (train.micro_batch_size * dp),
        tokens_per_step=train.global_batch_tokens,
        total_tokens=train.global_batch_tokens * train.max_steps,
        horizon_steps=config.optimizer.horizon_steps or train.max_steps,
    )


def describe(config: RunConfig, derived: Derived) -> list[tuple[str, str]]:
    """Lines of (name, value with its factors) for the log and `megascale check`."""
    parallel, train = config.parallel, config.train
    model_ranks = parallel.tp * parallel.pp * parallel.cp
    return [
        ("ranks", f"{derived.world_size} = dp {derived.dp} x (tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp}"
                  f" = {model_ranks})"),
        ("tokens per step", f"{derived.tokens_per_step:,} = micro-batch {train.micro_batch_size} x accumulation"
                            f" {derived.num_micro_batches} x dp {derived.dp} x seq_len {train.seq_len}"),
        ("rows per step", f"{derived.rows_per_step:,} = {derived.tokens_per_step:,} / seq_len {train.seq_len}"),
        ("tokens of the run", f"{derived.total_tokens:,} = {derived.tokens_per_step:,} x {train.max_steps:,} steps"),
        ("sharding", f"ZeRO-{parallel.zero_stage} over dp {derived.dp}"),
        ("precision", f"{config.precision.dtype} parameters and activations, fp32 masters, moments and accumulation"),
    ]
