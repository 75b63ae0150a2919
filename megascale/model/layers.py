"""A layer's place in the model, as data: what a family returns and a pipeline stage builds from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class LayerSpec:
    """One layer of the ordered list that a model is.

    The layer that `build` makes is called as `layer(hidden, context)` and returns the next hidden state; the first gets
    token ids, the last returns logits. Any contiguous part of the list can run by itself on a pipeline stage.

    Attributes:
        name: global name; the layer's parameters are called `{name}.{their name in the layer}`.
        build: makes the layer, its parameters not yet initialised.
        tied: name of a parameter in the layer -> global name of the parameter that takes its place.
    """

    name: str
    build: Callable[[], nn.Module]
    tied: Mapping[str, str] = field(default_factory=dict)
