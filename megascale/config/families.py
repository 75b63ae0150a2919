"""What a family of transformers is, where a config leaves it open: one row each.

A family is a combination of the shared layers. What is written here is all that distinguishes it outside of its page in
`megascale/model/families/`.
"""

from dataclasses import dataclass
from typing import Literal

Family = Literal["gpt2", "llama", "palm", "moe", "bert", "t5", "transformer", "vit"]
Activation = Literal["gelu", "gelu_tanh", "relu", "swiglu", "geglu"]
ObjectiveKind = Literal["causal", "mlm", "span", "pairs", "classify", "mae"]
GATED = ("swiglu", "geglu")
"""Activations that multiply two products."""


@dataclass(frozen=True)
class Traits:
    """What holds for a family.

    Attributes:
        norm: LayerNorm, or RMSNorm, which has no bias.
        order: where the norms of a block stand: `pre`, before each half; `post`, after each sum; `parallel`, one before
            both halves, which are added at once.
        positions: how the model learns where a token is: a table that is added, rotated queries and keys, a bias on the
            scores by distance, or sines that are added.
        activation: of the feed-forward layer, by default.
        has_bias: whether linear layers and LayerNorm have biases, by default.
        is_tied: whether the head is the token embedding, by default.
        is_causal: whether a position of the (only or last) stack sees those before it only.
        has_decoder: whether an encoder's output is read by a second stack.
        objectives: what it is trained on; the first by default.
    """

    norm: Literal["layer", "rms"]
    order: Literal["pre", "post", "parallel"]
    positions: Literal["learned", "rotary", "relative", "sinusoidal"]
    activation: Activation
    has_bias: bool
    is_tied: bool
    is_causal: bool
    has_decoder: bool
    objectives: tuple[ObjectiveKind, ...]


TRAITS: dict[str, Traits] = {
    "gpt2": Traits("layer", "pre", "learned", "gelu_tanh", True, True, True, False, ("causal",)),
    "llama": Traits("rms", "pre", "rotary", "swiglu", False, False, True, False, ("causal",)),
    "palm": Traits("layer", "parallel", "rotary", "swiglu", False, True, True, False, ("causal",)),
    "moe": Traits("rms", "pre", "rotary", "swiglu", False, False, True, False, ("causal",)),
    "bert": Traits("layer", "post", "learned", "gelu", True, True, False, False, ("mlm",)),
    "t5": Traits("rms", "pre", "relative", "relu", False, True, True, True, ("span", "pairs")),
    "transformer": Traits("layer", "post", "sinusoidal", "relu", True, True, True, True, ("pairs", "span")),
    "vit": Traits("layer", "pre", "learned", "gelu", True, False, False, False, ("classify", "mae")),
}
