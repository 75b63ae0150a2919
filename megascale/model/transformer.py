"""The root module: every layer of a model under its global name, run in order.

Shapes: B rows, T positions, D d_model, V padded vocabulary.
"""

import torch
from torch import nn

from megascale.config.model import ModelConfig
from megascale.model.context import Context, build_context
from megascale.model.init import initialize_parameters
from megascale.model.layers import LayerSpec
from megascale.model.registry import FAMILIES


class Transformer(nn.Module):
    """An ordered list of layers with global names such as `blocks.0.attention.qkv.weight`.

    Attributes:
        config: the shape that the layers were built from.
        specs: the list as data.
    """

    def __init__(self, config: ModelConfig, specs: list[LayerSpec]):
        super().__init__()
        self.config = config
        self.specs = tuple(specs)
        for spec in specs:
            parent_name, _, own_name = spec.name.rpartition(".")
            self.container(parent_name).add_module(own_name, spec.build())
        for spec in specs:
            for own_name, global_name in spec.tied.items():
                parent_name, _, parameter_name = f"{spec.name}.{own_name}".rpartition(".")
                setattr(self.get_submodule(parent_name), parameter_name, self.get_parameter(global_name))

    def container(self, name: str) -> nn.Module:
        """The module that holds the layers whose names begin with `name`; made when the first of them is added."""
        if name and not hasattr(self, name):
            self.add_module(name, nn.Module())
        return self.get_submodule(name)

    @property
    def layers(self) -> list[nn.Module]:
        """The layers, first to last."""
        return [self.get_submodule(spec.name) for spec in self.specs]

    def forward(
        self, tokens_BT: torch.Tensor, context: Context | None = None, last_B: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits of the token after each position, in the model's dtype.

        Given `last_B`, the head sees that position of each row only, which is all that generation needs.

        Shape: (B, T) int64 to (B, T, V), or with `last_B` (B) int64 to (B, V). Ids from `vocab_size` on get minus
            infinity.
        """
        context = context or build_context(self.config, tokens_BT.shape[1], tokens_BT.device)
        *body, head = self.layers
        hidden = tokens_BT
        for layer in body:
            hidden = layer(hidden, context)
        if last_B is not None:
            hidden = hidden[torch.arange(len(last_B), device=last_B.device), last_B]
        return head(hidden, context)


def build_model(config: ModelConfig, seed: int) -> Transformer:
    """A whole model in fp32 on the CPU, every parameter initialised by its name and the seed."""
    model = Transformer(config, FAMILIES[config.family](config))
    initialize_parameters(model, config, seed)
    return model


def compile_blocks(model: Transformer, backend: str = "inductor") -> None:
    """Compiles each block in place by `torch.compile`, without a change of parameter names.

    Equal blocks share one compiled graph, so start-up costs the same for 2 layers and for 100.
    """
    for spec, layer in zip(model.specs, model.layers, strict=True):
        if spec.name.startswith("blocks."):
            layer.compile(backend=backend)
