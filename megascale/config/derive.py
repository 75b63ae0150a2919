"""Every number that follows from a config and a world size, computed once and printed with its factors."""

from dataclasses import dataclass

from megascale.config.batch_plan import BatchPlan
from megascale.config.layout_rules import batch_sizes
from megascale.config.schema import RunConfig
from megascale.config.training import TrainConfig
from megascale.config.validate import check_config


@dataclass(frozen=True)
class Derived:
    """What the config and the number of ranks imply.

    Attributes:
        world_size: ranks of the run.
        dp: replicas of the model.
        batches: rows of each optimizer step over all replicas.
        num_micro_batches: forward passes of one replica in one step, of the last size of the batch as the next one.
        tokens_per_step: input tokens of one step over all replicas.
        total_tokens: input tokens of the whole run.
        horizon_steps: step at which the learning-rate schedule ends.
        num_stages: pipeline stages of one replica; 1 without a pipeline.
        attention_columns: positions of each row that one rank's attention holds.
        residual_columns: positions of each row that one rank's residual stream holds.
    """

    world_size: int
    dp: int
    batches: BatchPlan
    num_micro_batches: int
    tokens_per_step: int
    total_tokens: int
    horizon_steps: int
    num_stages: int
    attention_columns: int
    residual_columns: int


def derive(config: RunConfig, world_size: int, source: str | None = None) -> Derived:
    """Checks the config for `world_size` ranks and computes what follows from it; `source` names it in messages.

    Raises:
        ConfigError: the config can't run on that many ranks.
    """
    check_config(config, world_size, source)
    parallel, train = config.parallel, config.train
    dp = world_size // (parallel.tp * parallel.pp * parallel.cp)
    batches = plan_batches(train)
    return Derived(
        world_size=world_size,
        dp=dp,
        batches=batches,
        num_micro_batches=batches.sizes[-1] // (train.micro_batch_size * dp),
        tokens_per_step=train.global_batch_tokens,
        total_tokens=batches.first_row(train.max_steps) * train.seq_len,
        horizon_steps=config.optimizer.horizon_steps or train.max_steps,
        num_stages=parallel.num_stages,
        attention_columns=train.seq_len // parallel.cp,
        residual_columns=train.seq_len // parallel.cp // (parallel.tp if parallel.is_sequence_parallel else 1),
    )


def plan_batches(train: TrainConfig) -> BatchPlan:
    """The rows of each step, those of the ramp first."""
    first_steps = (0, *(stage.until_step for stage in train.batch_ramp))
    return BatchPlan(first_steps, tuple(tokens // train.seq_len for tokens in batch_sizes(train).values()))


def describe(config: RunConfig, derived: Derived) -> list[tuple[str, str]]:
    """Lines of (name, value with its factors) for the log and `megascale check`."""
    parallel, train = config.parallel, config.train
    model_ranks = parallel.tp * parallel.pp * parallel.cp
    return [
        ("ranks", f"{derived.world_size} = dp {derived.dp} x (tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp}"
                  f" = {model_ranks})"),
        ("tokens per step", f"{derived.tokens_per_step:,} = micro-batch {train.micro_batch_size} x accumulation"
                            f" {derived.num_micro_batches} x dp {derived.dp} x seq_len {train.seq_len}"),
        ("rows per step", f"{derived.batches.sizes[-1]:,} = {derived.tokens_per_step:,} / seq_len {train.seq_len}"),
        *_describe_length(config, derived),
        *_describe_axes(config, derived),
        ("sharding", _describe_sharding(config, derived)),
        ("precision", f"{config.precision.dtype} parameters and activations, fp32 masters, moments and accumulation"
                      f"{', fp8 products in linear layers' if config.precision.fp8_linear else ''}"),
        ("recompute", _describe_recompute(config)),
    ]


def _describe_length(config: RunConfig, derived: Derived) -> list[tuple[str, str]]:
    """Tokens of the run, and how its batch grows."""
    train, batches = config.train, derived.batches
    if not train.batch_ramp:
        return [("tokens of the run",
                 f"{derived.total_tokens:,} = {derived.tokens_per_step:,} x {train.max_steps:,} steps")]
    starts = zip(batches.first_steps, batches.sizes, strict=True)
    sizes = ", ".join(f"{rows:,} rows from step {first:,}" for first, rows in starts)
    return [("batch ramp", sizes),
            ("tokens of the run", f"{derived.total_tokens:,} in {train.max_steps:,} steps, with the ramp")]


def _describe_axes(config: RunConfig, derived: Derived) -> list[tuple[str, str]]:
    """A line for each axis that shares the model or its rows out."""
    parallel, model, lines = config.parallel, config.model, []
    tp, cp = parallel.tp, parallel.cp
    if tp > 1:
        kv_heads = f"{model.kv_heads} / {tp} = {model.kv_heads // tp} kv heads" if model.kv_heads >= tp else (
            f"1 of {model.kv_heads} kv heads, shared by {tp // model.kv_heads} ranks")
        lines.append(("tensor parallel", (
            f"each of tp {tp} ranks: {model.num_heads} / {tp} = {model.num_heads // tp} heads, {kv_heads}, d_ff"
            f" {model.ffn_dim:,} / {tp} = {model.ffn_dim // tp:,}, vocabulary {model.padded_vocab_size:,} / {tp} ="
            f" {model.padded_vocab_size // tp:,} rows")))
    if cp > 1:
        lines.append(("context parallel", (
            f"{parallel.context_attention} attention over seq_len {config.train.seq_len} / cp {cp} ="
            f" {derived.attention_columns} positions")))
    if parallel.ep > 1:
        experts, replicas = model.moe.num_experts, derived.dp * cp
        lines.append(("expert parallel", (
            f"each of ep {parallel.ep} ranks: {experts} / {parallel.ep} = {experts // parallel.ep} experts of a layer;"
            f" dp {derived.dp} x cp {cp} / {parallel.ep} = {replicas // parallel.ep} ranks hold the same ones")))
    if parallel.is_sequence_parallel:
        lines.append(("sequence parallel", (
            f"norms, dropout and residual on seq_len {config.train.seq_len} / cp {cp} / tp {tp} ="
            f" {derived.residual_columns} positions{'' if parallel.sequence_parallel else ', by default'}")))
    if parallel.pp > 1:
        per_rank = f"{parallel.stages_per_rank} per rank{'' if parallel.virtual_stages else ' by default'}"
        lines.append(("pipeline", (
            f"{derived.num_stages} stages = pp {parallel.pp} x {per_rank}, schedule {parallel.schedule}, micro-batches"
            f" a step: {derived.num_micro_batches}")))
    return lines


def _describe_sharding(config: RunConfig, derived: Derived) -> str:
    parallel = config.parallel
    where = "; optimizer state in CPU memory" if parallel.offload_optimizer == "cpu" else ""
    over = f"dp {derived.dp} x cp {parallel.cp} = {derived.dp * parallel.cp}"
    experts = f", of experts over {derived.dp * parallel.cp // parallel.ep}" if parallel.ep > 1 else ""
    return f"ZeRO-{parallel.zero_stage} over {over}{experts}{where}"


def _describe_recompute(config: RunConfig) -> str:
    train = config.train
    parts = f" ({', '.join(train.recompute_parts)})" if train.recompute == "selective" else ""
    every = f", one block in {train.recompute_every}" if train.recompute_every > 1 else ""
    return f"{train.recompute}{parts}{every}{'; activations in CPU memory' if train.offload_activations else ''}"
