"""Rules of models with an encoder and a decoder, and of what they are trained on."""

from collections.abc import Iterable

from megascale.config.schema import RunConfig
from megascale.config.target import span_plan, target_len


def pair_rules(config: RunConfig, world_size: int) -> Iterable[str]:
    """What rows of sources and targets ask of the data."""
    if not config.model.traits.has_decoder:
        return
    kind, data, length = config.objective_kind, config.data, target_len(config)
    if length > config.model.max_seq_len:
        yield (
            f"{_origin(config)} = {length} positions of the decoder are more than model.max_seq_len ="
            f" {config.model.max_seq_len}; use at most {config.model.max_seq_len}, or raise model.max_seq_len"
        )
    if kind == "span" and length < span_plan(config).target:
        plan = span_plan(config)
        yield (
            f"data.objective.target_len = {length} is shorter than the target of a full row: of {plan.text} tokens"
            f" {plan.hidden} are hidden, in {plan.spans} spans with a sentinel each, and an end follows: {plan.target}"
            f" positions; use {plan.target} or more, or leave it out"
        )
    if kind == "pairs" and data.packing != "none":
        yield (
            f"data.packing = {data.packing} with data.objective.kind = pairs: a row is one pair, which packing would"
            " cut or join with others; use packing: none"
        )
    for name, source in data.sources.items():
        if source.fim_fraction:
            yield (
                f"fim_fraction = {source.fim_fraction} of corpus {name} with data.objective.kind = {kind}: documents"
                " rearranged to fill in the middle are for the next token; leave it out"
            )


def pair_layout_rules(config: RunConfig, world_size: int) -> Iterable[str]:
    """What a hidden state of two parts asks of the layout."""
    if not config.model.traits.has_decoder:
        return
    parallel, family, length = config.parallel, config.model.family, target_len(config)
    if parallel.cp > 1:
        yield (
            f"parallel.cp = {parallel.cp} with model.family = {family}: attention over parts of a row knows neither a"
            " decoder that reads an encoder of another length nor a bias by distance; use cp 1, and tp for longer rows"
        )
    if parallel.is_sequence_parallel and length % parallel.tp:
        above = -(-length // parallel.tp) * parallel.tp
        yield (
            f"{_origin(config)} = {length} positions of the decoder don't divide by parallel.tp = {parallel.tp}, and"
            f" sequence parallelism deals them out evenly; use a data.objective.target_len of {above}, or"
            " sequence_parallel: false"
        )
    if parallel.stage_layers is not None:
        yield (
            f"parallel.stage_layers = {list(parallel.stage_layers)} with model.family = {family}: blocks of its two"
            " stacks cost differently, and a norm stands between them; leave it out, stages are then cut by cost"
        )


def _origin(config: RunConfig) -> str:
    """Where the decoder's length comes from."""
    if config.data.objective.target_len is not None:
        return "data.objective.target_len"
    return "train.seq_len, which data.objective.target_len follows," if config.objective_kind != "span" else (
        "the target of a full row of spans"
    )
