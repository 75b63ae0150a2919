"""What optimizers see of tensors that must be whole for their update, however ranks share them out.

An *element-wise* optimizer works on any part of a parameter. Others need whole matrices: the engine then puts a
`WholeTensors` into the group, which brings the parts together, and takes this rank's part of the result.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch


@dataclass
class WholeTensor:
    """One parameter as its optimizer needs it.

    Attributes:
        name: global name.
        shape: whole in its last two dims (a vector: in its last); dims before count matrices of a stack, those here.
        read_value: gives the parameter itself, in this shape, in the format in which the model uses it.
        state: what the optimizer keeps of it as a whole, by kind; it lives on every rank that updates a part.
    """

    name: str
    shape: tuple[int, ...]
    read_value: Callable[[], torch.Tensor]
    state: dict[str, torch.Tensor] = field(default_factory=dict)


class WholeTensors(Protocol):
    """The parameters of a group of which this rank updates a part."""

    def __iter__(self) -> Iterator[WholeTensor]:
        """In an order that is the same on all ranks which share their tensors."""

    def replace_gradients(self, update: Callable[[WholeTensor, torch.Tensor], None]) -> None:
        """Calls `update(tensor, gradient)` for each, with the whole gradient, which it changes in place.

        The group's gradients are then what it left. Every rank that has the group calls it.
        """


class LocalTensors:
    """Parameters that nobody shares, as in a plain loop. `names` are those of the group's parameters."""

    def __init__(self, parameters: list[torch.Tensor], names: list[str]):
        self.parameters = parameters
        self.tensors = [
            WholeTensor(name, tuple(parameter.shape), parameter.detach)
            for name, parameter in zip(names, parameters, strict=True)
        ]

    def __iter__(self) -> Iterator[WholeTensor]:
        return iter(self.tensors)

    def replace_gradients(self, update: Callable[[WholeTensor, torch.Tensor], None]) -> None:
        for tensor, parameter in zip(self.tensors, self.parameters, strict=True):
            update(tensor, parameter.grad)


def whole_tensors(group: dict) -> WholeTensors:
    """Those of a group: the engine's, or the group's own parameters."""
    if "whole_tensors" not in group:
        group["whole_tensors"] = LocalTensors(group["params"], group["names"])
    return group["whole_tensors"]
