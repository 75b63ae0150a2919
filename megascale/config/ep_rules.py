"""Which layouts can share out experts: small rules, each with the numbers, the reason and the nearest legal choice."""

from collections.abc import Iterable
from math import gcd

from megascale.config.model import divisors, divisors_of
from megascale.config.schema import RunConfig


def expert_rules(config: RunConfig, world_size: int) -> Iterable[str]:
    """What keeps experts from being shared out over the ep ranks."""
    parallel, moe = config.parallel, config.model.moe
    ep = parallel.ep
    if ep == 1:
        return
    if moe is None:
        yield (
            f"parallel.ep = {ep} with model.family = {config.model.family}: it has no experts to share out; use ep 1,"
            " or family moe"
        )
        return
    if parallel.zero_stage > 1:
        yield (
            f"parallel.zero_stage = {parallel.zero_stage} with parallel.ep = {ep}: DeepSpeed's ZeRO-2 and 3 share all"
            " parameters out over one group of ranks, and experts have fewer replicas than the rest; use zero_stage 0"
            " or 1, or ep 1"
        )
    if moe.num_experts % ep:
        yield (
            f"parallel.ep = {ep} does not divide model.moe.num_experts = {moe.num_experts}; use one of"
            f" {divisors(moe.num_experts)}"
        )
    dp, rest = divmod(world_size, parallel.tp * parallel.pp * parallel.cp)
    if rest == 0 and dp * parallel.cp % ep:
        yield (
            f"parallel.ep = {ep} does not divide dp {dp} x cp {parallel.cp} = {dp * parallel.cp}, the ranks that share"
            f" out the {moe.num_experts} experts; use one of {divisors(gcd(moe.num_experts, dp * parallel.cp))}"
        )


def expert_degrees(config: RunConfig) -> list[int]:
    """The degrees of expert parallelism that the model's experts can be cut by."""
    return [1] if config.model.moe is None else divisors_of(config.model.moe.num_experts)
