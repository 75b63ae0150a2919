"""Which layouts can hold a model and a batch: small rules, and the search for the nearest legal layouts.

Each rule yields a line with the numbers, the reason and the nearest legal choice.
"""

from collections.abc import Iterable
from itertools import product
from math import lcm, log2

from megascale.config.ep_rules import expert_degrees, expert_rules
from megascale.config.model import divisors, divisors_of
from megascale.config.moe_rules import expert_width_rules
from megascale.config.optimizer_rules import optimizer_rules
from megascale.config.schedules import (
    SCHEDULES,
    micro_batch_rule,
    nearest_micro_batches,
    schedules_that_take,
    takes_micro_batches,
)
from megascale.config.schema import RunConfig
from megascale.config.t5_rules import pair_layout_rules
from megascale.config.training import ParallelConfig, TrainConfig
from megascale.config.vit_rules import vit_layout_rules

MAX_PROPOSALS = 3


def layout_problems(config: RunConfig, world_size: int) -> list[str]:
    """Every rule that the layout breaks on `world_size` ranks."""
    rules = (_rank_rules, _zero_rules, _head_rules, _width_rules, _sequence_rules, _stage_rules, _hand_split_rules,
             _micro_batch_rules, _compile_rules, vit_layout_rules, expert_rules, pair_layout_rules, expert_width_rules,
             optimizer_rules)
    return [problem for rule in rules for problem in rule(config, world_size)]


def num_model_ranks(parallel: ParallelConfig) -> int:
    """Ranks of one replica: tp x pp x cp."""
    return parallel.tp * parallel.pp * parallel.cp


def batch_unit(config: RunConfig, world_size: int) -> int | None:
    """Tokens of one micro-batch over all replicas, or None where the ranks don't hold whole replicas."""
    num_replicas, rest = divmod(world_size, num_model_ranks(config.parallel))
    return None if rest else config.train.micro_batch_size * config.train.seq_len * num_replicas


def batch_sizes(train: TrainConfig) -> dict[str, int]:
    """Tokens of each size that the batch has during the run, by their keys, in the order of the steps."""
    ramp = {f"batch_ramp.{number}.global_batch_tokens": stage.global_batch_tokens
            for number, stage in enumerate(train.batch_ramp)}
    return ramp | {"global_batch_tokens": train.global_batch_tokens}


def nearest_layouts(config: RunConfig, world_size: int) -> list[ParallelConfig]:
    """The legal layouts of `world_size` ranks nearest to the one asked for, nearest first.

    Everything but tp, pp, cp and ep stays as it was; a split of the layers by hand goes where it no longer fits.
    Distance is the number of doublings and halvings from one layout to the other, then that of the ranks of a replica.
    """
    asked = config.parallel

    def distance(degrees: tuple[int, int, int, int]) -> tuple:
        changes = [log2(new / old) for new, old in zip(degrees, (asked.tp, asked.pp, asked.cp, asked.ep), strict=True)]
        return sum(map(abs, changes)), abs(sum(changes[:3])), degrees

    found = []
    layouts = product(*[divisors_of(world_size)] * 3, expert_degrees(config))
    for degrees in sorted((d for d in layouts if world_size % (d[0] * d[1] * d[2]) == 0), key=distance):
        candidate = _with_degrees(config, *degrees)
        unit = batch_unit(candidate, world_size)
        is_even = not any(tokens % unit for tokens in batch_sizes(config.train).values())
        if is_even and not layout_problems(candidate, world_size):
            found.append(candidate.parallel)
            if len(found) == MAX_PROPOSALS:
                break
    return found


def describe_proposals(config: RunConfig, world_size: int) -> str:
    """The nearest legal layouts as the last line of a refusal."""
    layouts = nearest_layouts(config, world_size)
    if not layouts:
        return f"no tp, pp and cp over {world_size} ranks go with the rest of this config"
    described = []
    for layout in layouts:
        dp = world_size // num_model_ranks(layout)
        split = " without stage_layers" if layout.stage_layers != config.parallel.stage_layers else ""
        experts = f" with ep {layout.ep}" if layout.ep > 1 or config.parallel.ep > 1 else ""
        described.append(f"tp {layout.tp} x pp {layout.pp} x cp {layout.cp} x dp {dp}{experts}{split}")
    return f"the nearest legal layouts of {world_size} ranks: {'; '.join(described)}"


def _with_degrees(config: RunConfig, tp: int, pp: int, cp: int, ep: int) -> RunConfig:
    parallel = config.parallel.model_copy(update={"tp": tp, "pp": pp, "cp": cp, "ep": ep})
    candidate = config.model_copy(update={"parallel": parallel})
    if any(_hand_split_rules(candidate, tp * pp * cp)):
        parallel = parallel.model_copy(update={"stage_layers": None})
    return config.model_copy(update={"parallel": parallel})


def _rank_rules(config: RunConfig, world_size: int) -> Iterable[str]:
    parallel, model_ranks = config.parallel, num_model_ranks(config.parallel)
    if world_size % model_ranks:
        choices = nearest_multiples(world_size, model_ranks)
        yield (
            f"{world_size} ranks can't hold whole replicas of tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp} ="
            f" {model_ranks} ranks; use {choices} ranks"
        )


def _zero_rules(config: RunConfig, world_size: int) -> Iterable[str]:
    parallel = config.parallel
    if parallel.pp > 1 and parallel.zero_stage > 1:
        yield (
            f"parallel.zero_stage = {parallel.zero_stage} with parallel.pp = {parallel.pp}: a pipeline needs whole"
            " gradients until its last micro-batch, so only ZeRO 0 and 1 go with it; use zero_stage 1"
        )


def _head_rules(config: RunConfig, world_size: int) -> Iterable[str]:
    tp, cp, heads, kv_heads = config.parallel.tp, config.parallel.cp, config.model.num_heads, config.model.kv_heads
    if heads % tp:
        yield f"parallel.tp = {tp} does not divide model.num_heads = {heads}; use one of {divisors(heads)}"
    elif kv_heads % tp and tp % kv_heads:
        legal = [degree for degree in divisors_of(heads) if kv_heads % degree == 0 or degree % kv_heads == 0]
        yield (
            f"parallel.tp = {tp} neither divides model.num_kv_heads = {kv_heads} nor is a multiple of it: a rank holds"
            f" whole key-value heads, or shares one with as many ranks as every other; use one of"
            f" {', '.join(map(str, legal))}"
        )
    elif config.parallel.context_attention == "ulysses" and heads // tp % cp:
        yield (
            f"parallel.cp = {cp} does not divide model.num_heads / tp = {heads} / {tp} = {heads // tp}, and ulysses"
            f" gives each cp rank whole heads; use one of {divisors(heads // tp)}, or context_attention: ring"
        )


def _width_rules(config: RunConfig, world_size: int) -> Iterable[str]:
    tp, model = config.parallel.tp, config.model
    if model.ffn_dim % tp:
        yield (
            f"parallel.tp = {tp} does not divide model.d_ff = {model.ffn_dim}; use"
            f" {_nearest_divisors(tp, model.ffn_dim)}, or a d_ff of {nearest_multiples(model.ffn_dim, tp)}"
        )
    if model.padded_vocab_size % tp:
        yield (
            f"parallel.tp = {tp} does not divide the {model.padded_vocab_size} rows of the padded vocabulary"
            f" (model.vocab_size {model.vocab_size} rounded up to a multiple of model.vocab_multiple"
            f" {model.vocab_multiple}); use {_nearest_divisors(tp, model.padded_vocab_size)}, or vocab_multiple"
            f" {lcm(tp, model.vocab_multiple)}"
        )


def _sequence_rules(config: RunConfig, world_size: int) -> Iterable[str]:
    if config.model.vision is not None:
        return  # its rows are images, which have rules of their own
    parallel, seq_len = config.parallel, config.train.seq_len
    tp, cp, is_ring = parallel.tp, parallel.cp, parallel.context_attention == "ring"
    num_chunks = (2 * cp if is_ring else cp) if cp > 1 else 1
    shares = cp * tp if parallel.is_sequence_parallel else cp
    choices = nearest_multiples(seq_len, lcm(num_chunks, shares), config.model.max_seq_len)
    if seq_len % num_chunks:
        reason = (
            f"ring attention deals a row out in 2 x cp = {num_chunks} equal chunks, two to a rank, so that all have the"
            " same work under a causal mask" if is_ring else f"ulysses deals a row out in {cp} equal parts"
        )
        yield f"train.seq_len = {seq_len} with parallel.cp = {cp}: {reason}; use a seq_len of {choices}"
    elif seq_len % shares:
        whose = "" if parallel.sequence_parallel else " (on by default when tp > 1)"
        yield (
            f"train.seq_len = {seq_len} / cp {cp} = {seq_len // cp} positions don't divide by parallel.tp = {tp}, and"
            f" sequence parallelism{whose} deals them out evenly; use a seq_len of {choices}, or sequence_parallel:"
            " false"
        )


def _stage_rules(config: RunConfig, world_size: int) -> Iterable[str]:
    parallel, num_layers = config.parallel, config.model.num_blocks
    if num_layers < parallel.num_stages:
        most = max(1, num_layers // parallel.stages_per_rank)
        fewer = " or fewer virtual_stages," if parallel.stages_per_rank > 1 else ""
        yield (
            f"model.num_layers = {num_layers} can't fill {parallel.num_stages} stages (parallel.pp {parallel.pp} x"
            f" {parallel.stages_per_rank} per rank of {parallel.schedule}), one block or more for each; use pp of at"
            f" most {most},{fewer} or num_layers of {parallel.num_stages} or more"
        )


def _hand_split_rules(config: RunConfig, world_size: int) -> Iterable[str]:
    parallel, num_layers = config.parallel, config.model.num_layers
    if parallel.stage_layers is None:
        return
    split = f"parallel.stage_layers = {list(parallel.stage_layers)}"
    if parallel.pp == 1:
        yield f"{split} has no stages to share out, since parallel.pp = 1; leave it out, or use pp 2 or more"
    elif len(parallel.stage_layers) != parallel.num_stages:
        yield (
            f"{split} names {len(parallel.stage_layers)} stages, and pp {parallel.pp} x {parallel.stages_per_rank} per"
            f" rank are {parallel.num_stages}; give {parallel.num_stages} numbers, or leave it out"
        )
    if parallel.pp > 1 and sum(parallel.stage_layers) != num_layers:
        yield (
            f"{split} adds up to {sum(parallel.stage_layers)} blocks, and model.num_layers = {num_layers}; share out"
            f" {num_layers}, or leave it out"
        )


def _micro_batch_rules(config: RunConfig, world_size: int) -> Iterable[str]:
    unit = batch_unit(config, world_size)
    if config.parallel.pp == 1 or unit is None:
        return
    for key, tokens in batch_sizes(config.train).items():
        if tokens % unit == 0:
            yield from _micro_batches_of(config, key, tokens, unit)


def _micro_batches_of(config: RunConfig, key: str, tokens: int, unit: int) -> Iterable[str]:
    """Whether the schedule can run one size of the batch."""
    parallel, train, number = config.parallel, config.train, tokens // unit
    stages = (parallel.pp, parallel.stages_per_rank)
    if takes_micro_batches(parallel.schedule, *stages, number):
        return
    batches = [f"{nearest * unit} ({nearest} micro-batches)" for nearest in
               nearest_micro_batches(parallel.schedule, *stages, number)]
    rows = number * train.micro_batch_size
    sizes = [size for size in divisors_of(rows) if takes_micro_batches(parallel.schedule, *stages, rows // size)]
    nearest_size = min(sizes, key=lambda size: abs(log2(size / train.micro_batch_size)), default=None)
    schedules = [name for name in schedules_that_take(*stages, number)
                 if not (train.compile and SCHEDULES[name].defers_weights)]
    remedies = [f"a {key} of {' or '.join(batches)}"]
    remedies += [f"micro_batch_size {nearest_size} ({rows // nearest_size} micro-batches)"] if nearest_size else []
    remedies += [f"schedule {' or '.join(schedules)}"] if schedules else []
    yield (
        f"parallel.schedule = {parallel.schedule} can't run {number} micro-batches ({key} {tokens} /"
        f" {unit}) over pp {parallel.pp}:"
        f" {micro_batch_rule(parallel.schedule, *stages, number)}; use {', or '.join(remedies)}"
    )


def _compile_rules(config: RunConfig, world_size: int) -> Iterable[str]:
    parallel = config.parallel
    if config.train.compile and parallel.pp > 1 and SCHEDULES[parallel.schedule].defers_weights:
        yield (
            f"train.compile with parallel.schedule = {parallel.schedule}: it puts weight gradients off until a rank has"
            " nothing better to do, a side effect that a compiled block can't have; use compile: false, or schedule"
            " 1f1b or interleaved_1f1b"
        )


def nearest_multiples(value: int, unit: int, limit: int | None = None) -> str:
    """The multiples of `unit` next to `value`, none over `limit`, as a message lists them."""
    below = value // unit * unit
    legal = [number for number in (below, below + unit) if number and (limit is None or number <= limit)]
    return " or ".join(map(str, legal)) or str(unit)


def _nearest_divisors(value: int, size: int) -> str:
    """The divisors of `size` next to `value`, as a message lists them."""
    below = max(divisor for divisor in divisors_of(size) if divisor <= value)
    above = min((divisor for divisor in divisors_of(size) if divisor > value), default=below)
    return f"tp {below}" if above == below else f"tp {below} or {above}"
