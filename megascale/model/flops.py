"""Parameters and floating-point operations of a model in closed form, without torch.

The sums of what `layer_forms.py` says of each layer; docs/flops.md derives it for every family. For one stack of blocks
it comes to 6N operations a token in training, for N weights that multiply it, and 12 L H C T for attention: a
multiplication and an addition are two operations, and the backward pass has twice the products of the forward pass (one
for the input's gradient, one for the weight's).

Attention itself has no weights: q k and the mixing of v take 2 C operations each per head and pair of positions. A
query at position t of a causal model sees t + 1 keys, (T + 1) / 2 on average. The usual convention counts all T
(Chowdhery et al. 2022, PaLM, appendix B). We follow it, so that the utilisation (MFU) we report can be compared; keys
outside a window don't count. Norms, activations, look-ups, the optimizer and recomputed activations don't count.
"""

from megascale.config.model import ModelConfig
from megascale.model.layer_forms import Form, LayerForm, Lengths, layer_forms, shared_form

NO_LENGTHS = Lengths(1, 1)
"""For counts that don't depend on them."""


def num_parameters(config: ModelConfig, *, has_padding: bool = True) -> int:
    """All trained parameters, with the vocabulary as padded in memory, or as published when `has_padding` is false."""
    layers = layer_forms(config, NO_LENGTHS, has_padding=has_padding)
    return shared_form(config).parameters + sum(layer.form.parameters for layer in layers)


def num_active_parameters(config: ModelConfig, *, has_padding: bool = True) -> int:
    """Those that a token meets: all but the experts that it isn't sent to."""
    layers = layer_forms(config, NO_LENGTHS, has_padding=has_padding)
    return num_parameters(config, has_padding=has_padding) - sum(layer.form.idle_experts for layer in layers)


def forward_flops_per_token(config: ModelConfig, seq_len: int, target_len: int = 0) -> int:
    """Operations of the forward pass on a row, shared out over its `seq_len` tokens (of an image: its patches).

    Args:
        target_len: positions of the decoder's rows, where there is one; 0: as many as the encoder's.
    """
    layers = layer_forms(config, Lengths(seq_len, target_len))
    return round(sum(layer.form.operations for layer in layers) / seq_len)


def train_flops_per_token(config: ModelConfig, seq_len: int, target_len: int = 0) -> int:
    """Operations of forward and backward, likewise."""
    return 3 * forward_flops_per_token(config, seq_len, target_len)


def block_layers(config: ModelConfig) -> set[int]:
    """Which numbers the blocks have in the list of layers, as `layer_costs` gives it."""
    return {number for number, layer in enumerate(layer_forms(config, NO_LENGTHS)) if layer.is_block}


def layer_costs(config: ModelConfig, seq_len: int, target_len: int = 0) -> list[float]:
    """Operations of each layer's forward pass per token, in the order of the layers.

    Look-ups and norms have no products; they count as one operation per feature, so that a layer is never free. A cut
    of the model into stages that balances these balances training too, where each is three times as much.
    """
    layers = layer_forms(config, Lengths(seq_len, target_len))
    return [max(layer.form.operations / seq_len, config.d_model) for layer in layers]


def sum_forms(config: ModelConfig, layers: set[int]) -> Form:
    """Parameters of the layers with these numbers, and of what every pipeline rank holds; no operations."""
    forms: list[LayerForm] = layer_forms(config, NO_LENGTHS)
    return sum((forms[number].form for number in sorted(layers)), shared_form(config))
