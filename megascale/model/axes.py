"""The axes that share out a model's layers, as every layer's constructor takes them."""

from dataclasses import dataclass
from typing import Literal

from megascale.parallel.axis import ALONE, Axis


@dataclass(frozen=True)
class Axes:
    """How the ranks of one replica share each layer; the default is one rank that has it all.

    Attributes:
        tp: ranks that share heads, feed-forward features and vocabulary.
        kv: those of the tp ranks that share one key-value head, where there are more tp ranks than such heads.
        cp: ranks that share the positions of each row.
        ep: ranks that share out the experts of each layer; they read other rows, or other positions of them.
        pp: the ranks of the pipeline; what layers of several stages share lives on all of them.
        ends: the first and the last pipeline rank; a tied embedding lives on both. Of size 1 on all other ranks.
        is_joined: whether what is around a layer shares out its inputs over tp and sums its outputs, for several layers
            at once.
        is_sequence_parallel: whether norms, dropout and the residual stream work on a tp-th of the positions.
        context_attention: how attention crosses the cp ranks.
    """

    tp: Axis = ALONE
    kv: Axis = ALONE
    cp: Axis = ALONE
    ep: Axis = ALONE
    pp: Axis = ALONE
    ends: Axis = ALONE
    is_joined: bool = False
    is_sequence_parallel: bool = False
    context_attention: Literal["ring", "ulysses"] = "ring"


ONE_RANK = Axes()
"""Nothing is shared: one rank has every layer whole."""
