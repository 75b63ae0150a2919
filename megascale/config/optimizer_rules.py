"""Which layouts an optimizer goes with. Pure."""

from collections.abc import Iterable

from megascale.config.optimizer import WHOLE_KINDS
from megascale.config.schema import RunConfig


def optimizer_rules(config: RunConfig, world_size: int) -> Iterable[str]:
    """What the optimizer can't do under the layout."""
    kind, parallel = config.optimizer.kind, config.parallel
    if config.model.mup_base_width is not None and kind in WHOLE_KINDS:
        yield (
            f"model.mup_base_width = {config.model.mup_base_width} with optimizer.kind = {kind}: its learning rates are"
            " those for adamw and lion; use one of them, or leave mup_base_width out"
        )
    if kind not in WHOLE_KINDS:
        return
    if parallel.zero_stage >= 2:
        yield (
            f"optimizer.kind = {kind} with parallel.zero_stage = {parallel.zero_stage}: its update of a matrix needs"
            f" the whole gradient, and ZeRO-{parallel.zero_stage} keeps it in parts that no rank puts together; use"
            " zero_stage: 1, or optimizer.kind: adamw or lion"
        )
    if parallel.offload_optimizer != "none":
        yield (
            f"optimizer.kind = {kind} with parallel.offload_optimizer = {parallel.offload_optimizer}: its matrix"
            " products belong on the device; use offload_optimizer: none, or optimizer.kind: adamw or lion"
        )
