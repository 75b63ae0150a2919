"""Every fact about a parameter that follows from its name: how tp cuts it, whether it decays, how it starts.

This is the only table of its kind. Slicing, tensor-parallel marks, decay groups, initialisation and export read it, so
a new layer needs one line here. The patterns are those of `fnmatch`; the first that fits counts.

The layouts of the fused weights make a plain cut along `tp_dim` hold whole heads and matching pairs: `qkv` has rows
(kv head, [query heads of its group, key, value], feature), and `gate_up` is stacked as (2, d_ff, d_model).
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

InitKind = Literal["normal", "residual", "vocabulary", "zeros", "ones"]


@dataclass(frozen=True)
class ParameterRule:
    """What holds for the parameters whose global name fits `pattern`.

    Attributes:
        pattern: an `fnmatch` pattern of global names.
        tp_dim: the dim that tensor parallelism cuts, None where every tp rank holds the whole.
        decays: whether weight decay applies: to matrices, not to norms and biases, as in the published training code
            of BERT (Devlin et al. 2019).
        init: how it starts, see `megascale.model.init`.
        ep_dim: the dim that expert parallelism cuts, None where every ep rank holds the whole.
        is_per_head: whether all heads share it, so that each tp rank, which has some of them, has a part of its
            gradient.
    """

    pattern: str
    tp_dim: int | None
    decays: bool
    init: InitKind
    ep_dim: int | None = None
    is_per_head: bool = False


RULES = (
    ParameterRule("embedding.tokens.weight", tp_dim=0, decays=True, init="vocabulary"),
    ParameterRule("embedding.positions.weight", tp_dim=None, decays=True, init="normal"),
    ParameterRule("embedding.segments.weight", tp_dim=None, decays=True, init="normal"),
    ParameterRule("embedding.patches.weight", tp_dim=None, decays=True, init="normal"),
    ParameterRule("embedding.patches.bias", tp_dim=None, decays=False, init="zeros"),
    ParameterRule("embedding.cls", tp_dim=None, decays=False, init="normal"),
    ParameterRule("head.embed.weight", tp_dim=None, decays=True, init="normal"),
    ParameterRule("head.embed.bias", tp_dim=None, decays=False, init="zeros"),
    ParameterRule("head.mask_token", tp_dim=None, decays=False, init="normal"),
    ParameterRule("head.predict.weight", tp_dim=None, decays=True, init="normal"),
    ParameterRule("head.predict.bias", tp_dim=None, decays=False, init="zeros"),
    ParameterRule("head.weight", tp_dim=0, decays=True, init="vocabulary"),
    ParameterRule("head.bias", tp_dim=0, decays=False, init="zeros"),
    ParameterRule("head.transform.weight", tp_dim=None, decays=True, init="normal"),
    ParameterRule("head.transform.bias", tp_dim=None, decays=False, init="zeros"),
    ParameterRule("head.pairs.*.weight", tp_dim=None, decays=True, init="normal"),
    ParameterRule("head.pairs.*.bias", tp_dim=None, decays=False, init="zeros"),
    ParameterRule("*.attention.[qk]_norm.weight", tp_dim=None, decays=False, init="ones", is_per_head=True),
    ParameterRule("*norm.weight", tp_dim=None, decays=False, init="ones"),
    ParameterRule("*norm.bias", tp_dim=None, decays=False, init="zeros"),
    ParameterRule("*blocks.*.attention.qkv.weight", tp_dim=0, decays=True, init="normal"),
    ParameterRule("*blocks.*.attention.qkv.bias", tp_dim=0, decays=False, init="zeros"),
    ParameterRule("*blocks.*.feed_forward.up.weight", tp_dim=0, decays=True, init="normal"),
    ParameterRule("*blocks.*.feed_forward.up.bias", tp_dim=0, decays=False, init="zeros"),
    ParameterRule("*blocks.*.feed_forward.gate_up.weight", tp_dim=1, decays=True, init="normal"),
    ParameterRule("*blocks.*.feed_forward.gate_up.bias", tp_dim=1, decays=False, init="zeros"),
    ParameterRule("*blocks.*.feed_forward.shared.up.weight", tp_dim=0, decays=True, init="normal"),
    ParameterRule("*blocks.*.feed_forward.shared.gate_up.weight", tp_dim=1, decays=True, init="normal"),
    ParameterRule("*blocks.*.router.weight", tp_dim=None, decays=True, init="normal"),
    ParameterRule("*blocks.*.experts.gate_up.weight", tp_dim=2, decays=True, init="normal", ep_dim=0),
    ParameterRule("*blocks.*.experts.up.weight", tp_dim=1, decays=True, init="normal", ep_dim=0),
    ParameterRule("*blocks.*.experts.output.weight", tp_dim=2, decays=True, init="residual", ep_dim=0),
    ParameterRule("*.relative_bias.weight", tp_dim=1, decays=False, init="normal"),
    ParameterRule("*blocks.*.cross_attention.query.weight", tp_dim=0, decays=True, init="normal"),
    ParameterRule("*blocks.*.cross_attention.query.bias", tp_dim=0, decays=False, init="zeros"),
    ParameterRule("*blocks.*.cross_attention.key_value.weight", tp_dim=0, decays=True, init="normal"),
    ParameterRule("*blocks.*.cross_attention.key_value.bias", tp_dim=0, decays=False, init="zeros"),
    ParameterRule("*blocks.*.output.weight", tp_dim=1, decays=True, init="residual"),
    ParameterRule("*blocks.*.output.bias", tp_dim=None, decays=False, init="zeros"),
)


def rule_of(name: str) -> ParameterRule:
    """The rule of the parameter with this global name.

    Raises:
        KeyError: no pattern fits: a layer was added without its line in the table.
    """
    for rule in RULES:
        if fnmatchcase(name, rule.pattern):
            return rule
    raise KeyError(f"parameter {name} fits no rule of megascale/model/sharding.py")


def is_decayed(name: str) -> bool:
    """Whether weight decay applies to the parameter with this global name."""
    return rule_of(name).decays
