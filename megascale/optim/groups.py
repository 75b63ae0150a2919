"""Which parameters an optimizer treats alike: decay, learning rate, and whether they are matrices to it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from megascale.config.optimizer import WHOLE_KINDS, OptimizerConfig
from megascale.errors import ConfigError
from megascale.optim.state import element_kinds


@dataclass(frozen=True)
class ParameterFacts:
    """What an optimizer has to know of a parameter.

    Attributes:
        decays: whether weight decay applies.
        is_matrix: whether it is a matrix of a hidden layer, or a stack of them (muon); or any matrix (adafactor).
        lr_factor, decay_factor: of muP; 1 without.
    """

    decays: bool
    is_matrix: bool = False
    lr_factor: float = 1.0
    decay_factor: float = 1.0


@dataclass(frozen=True)
class GroupKey:
    """What the parameters of a group have in common."""

    decays: bool
    weight_decay: float
    lr_factor: float
    is_matrix: bool


def group_of(name: str, facts: ParameterFacts, config: OptimizerConfig) -> GroupKey:
    """The group of a parameter."""
    lr_factor, weight_decay = 1.0, config.weight_decay if facts.decays else 0.0
    for group in config.groups:
        if fnmatchcase(name, group.match):
            lr_factor = group.lr_factor
            weight_decay = weight_decay if group.weight_decay is None else group.weight_decay
            break
    is_matrix = facts.is_matrix and config.kind in WHOLE_KINDS
    return GroupKey(facts.decays, weight_decay * facts.decay_factor, lr_factor * facts.lr_factor, is_matrix)


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], facts: Mapping[str, ParameterFacts], config: OptimizerConfig
) -> list[dict]:
    """Sorts parameters by what they have in common, for `build_optimizer`.

    All groups of the model are always there, in one order, even when one is empty: a pipeline stage without norms has
    as many groups as its peers, without which their gradient norms wait for each other for ever.

    Args:
        named_parameters: global names and parameters of this rank, in the model's order, which each group keeps.
        facts: by global name, of the whole model.

    Raises:
        ConfigError: a pattern of `optimizer.groups` fits no parameter.
    """
    check_patterns(facts, config)
    keys = {name: group_of(name, fact, config) for name, fact in facts.items()}
    order = list(dict.fromkeys(sorted(keys.values(), key=lambda key: (not key.decays, not key.is_matrix))))
    members: dict[GroupKey, list[tuple[str, nn.Parameter]]] = {key: [] for key in order}
    for name, parameter in named_parameters:
        members[keys[name]].append((name, parameter))
    return [
        {
            "params": [parameter for _, parameter in group], "names": [name for name, _ in group],
            "weight_decay": key.weight_decay, "lr_factor": key.lr_factor, "is_matrix": key.is_matrix,
            "needs_whole": key.is_matrix or config.kind == "adafactor",
            "has_factors": key.is_matrix and config.kind == "adafactor",
            "state_kinds": element_kinds(config, key.is_matrix),
        }
        for key, group in members.items()
    ]


def check_patterns(names: Iterable[str], config: OptimizerConfig) -> None:
    """Refuses patterns that fit nothing, which a misspelt one does.

    Raises:
        ConfigError: with the pattern and some of the names.
    """
    names = list(names)
    for number, group in enumerate(config.groups):
        if not any(fnmatchcase(name, group.match) for name in names):
            some = ", ".join(dict.fromkeys((names[0], names[len(names) // 2], names[-1])))
            raise ConfigError(
                f"optimizer.groups[{number}].match = {group.match} fits none of the model's {len(names)} parameters,"
                f" which have names such as {some}; `*` stands for anything, as in blocks.*.attention.*"
            )
