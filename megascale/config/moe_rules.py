"""What a mixture of experts can't be combined with, and which numbers of experts don't go together."""

from collections.abc import Iterable

from megascale.config.model import divisors
from megascale.config.schema import RunConfig


def moe_rules(config: RunConfig, world_size: int) -> Iterable[str]:
    """What experts can't be combined with in any layout."""
    model, moe = config.model, config.model.moe
    if moe is None:
        return
    if moe.top_k > moe.num_experts:
        yield (
            f"model.moe.top_k = {moe.top_k} is more than model.moe.num_experts = {moe.num_experts}: a token goes to"
            f" different experts; use at most {moe.num_experts}"
        )
    if moe.top_k == 1 and moe.normalize_scores:
        yield (
            "model.moe.normalize_scores = true with top_k 1 makes every score 1, and the router would learn nothing"
            " from the loss; set it to false, as in Switch"
        )
    if not model.sparse_blocks:
        yield (
            f"model.moe.num_dense_layers = {moe.num_dense_layers} and every = {moe.every} leave none of"
            f" {model.num_layers} blocks sparse; use num_dense_layers of at most {model.num_layers - moe.every},"
            " a smaller `every`, or family llama"
        )
    if model.has_bias:
        yield "model.bias = true with family moe: experts have no biases; leave it out, or use family llama"
    if config.train.compile:
        yield (
            "train.compile with family moe: how many tokens an expert has is known at run time only, and every new"
            " number would be compiled again; set it to false"
        )


def expert_width_rules(config: RunConfig, world_size: int) -> Iterable[str]:
    """Whether tp cuts experts evenly."""
    model, tp = config.model, config.parallel.tp
    if model.moe is not None and model.expert_dim % tp:
        yield (
            f"parallel.tp = {tp} does not divide the width of an expert, {model.expert_dim}: tp cuts the features of"
            f" each; use one of {divisors(model.expert_dim)}"
        )
