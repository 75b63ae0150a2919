"""Rules of family palm, whose blocks are one piece: attention and feed-forward read the same input and are summed."""

from collections.abc import Iterable

from megascale.config.schema import RunConfig

BOTH_PARTS = {"attention", "feed_forward"}


def palm_rules(config: RunConfig, world_size: int) -> Iterable[str]:
    """What a block in one piece can't do."""
    if config.model.traits.order != "parallel":
        return
    if config.model.has_bias:
        yield (
            "model.bias = true with model.family = palm: both halves of a block are summed over tp at once, and a bias"
            " would be added on every rank; leave it out, as Chowdhery et al. 2022 do"
        )
    if set(config.train.recompute_parts) != BOTH_PARTS:
        yield (
            f"train.recompute_parts = {list(config.train.recompute_parts)} with model.family = palm: its blocks have no"
            " halves, attention and feed-forward share their norm and their input; leave the parts out"
        )
