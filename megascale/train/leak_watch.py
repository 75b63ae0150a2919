"""What an engine computes forward and backward, position by position: checksums of bits, and where gradients are.

Shapes: B rows, T positions of this rank, D d_model, N positions of several rows, X numbers of each.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from megascale.data.batch import Batch
from megascale.engine.base import Engine
from megascale.engine.taps import stages_of
from megascale.model.context import Context
from megascale.model.dropout import mix_64
from megascale.model.head import Head
from megascale.model.loss import rows_of_chunk
from megascale.train.trace import BITS_OF, WatchedLayer

PIECE_ELEMENTS = 2**24
"""Numbers that are hashed at a time: 128 MiB of int64, a few times over."""


class Sight(NamedTuple):
    """What a pass computed on this rank, by micro-batch in their order.

    Attributes:
        sums: name of a layer -> checksums of its output at each position, int64 (B, T).
        reached: whether there is a gradient at the embedding's output, bool (B, T); empty on ranks without it.
    """

    sums: dict[str, list[torch.Tensor]]
    reached: dict[int, torch.Tensor]


class Watch:
    """Hangs itself onto an engine and sees what its layers compute. Every rank makes one.

    A stage takes the micro-batches of a step in their order under every schedule, so that calls can be counted.

    Args:
        layer_names: names of the layers of each of this rank's stages.
        first_layer: name of the model's first layer, at whose output gradients are looked at.
    """

    def __init__(self, engine: Engine, layer_names: list[list[str]], first_layer: str):
        self.engine = engine
        self.sight = Sight({}, {})
        for stage, own_names in zip(stages_of(engine), layer_names, strict=True):
            for place, layer in enumerate(stage.layers):
                if own_names[place] == first_layer:
                    layer.register_forward_hook(partial(self._see_gradient, first_layer))
                stage.layers[place] = WatchedLayer(layer, own_names[place], self._see)
            if stage.head is not None:
                stage.head.loss = partial(self._see_logits, own_names[-1], stage.head, stage.head.loss)

    def run(self, batches: list[Batch]) -> Sight:
        """Takes the micro-batches forward and backward, as a step does, without an update."""
        self.sight = Sight({}, {})
        self.engine.runner.run(batches, step=0, scale=1.0)
        return self.sight

    def _see(self, name: str, hidden_BTD: torch.Tensor, _: Context) -> None:
        self._note(name, sum_bits(hidden_BTD.flatten(0, 1)).view(hidden_BTD.shape[:2]))

    def _see_logits(
        self, name: str, head: Head, loss: Callable, hidden_BTD: torch.Tensor, context: Context, labels_BT: torch.Tensor
    ) -> torch.Tensor:
        with torch.no_grad():
            shared_BTD = head.share(hidden_BTD)
            chunks = shared_BTD.flatten(0, 1).split(rows_of_chunk(len(head.weight), shared_BTD.device.type))
            sums = [sum_bits(F.linear(hidden_ND, head.weight, head.padding_bias())) for hidden_ND in chunks]
        self._note(name, torch.cat(sums).view(shared_BTD.shape[:2]))
        return loss(hidden_BTD, context, labels_BT)

    def _note(self, name: str, sums_BT: torch.Tensor) -> None:
        self.sight.sums.setdefault(name, []).append(sums_BT.cpu())

    def _see_gradient(self, name: str, _layer: nn.Module, _inputs: tuple, hidden_BTD: torch.Tensor) -> None:
        reached, number = self.sight.reached, len(self.sight.sums.get(name, ()))

        def note(gradient_BTD: torch.Tensor) -> None:
            reached[number] = (gradient_BTD != 0).any(dim=-1).cpu()

        hidden_BTD.register_hook(note)


def sum_bits(values_NX: torch.Tensor) -> torch.Tensor:
    """A checksum of the bits of each position's numbers; both zeros count as one number. Shape: (N, X) to (N) int64."""
    places_X = torch.arange(values_NX.shape[1], device=values_NX.device) << 32
    pieces = values_NX.detach().split(max(1, PIECE_ELEMENTS // values_NX.shape[1]))
    bits = BITS_OF[values_NX.dtype]
    return torch.cat([mix_64((piece + 0.0).view(bits).long() + places_X).sum(dim=1) for piece in pieces])
