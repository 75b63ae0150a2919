"""Which tensors an export has and in which file each lies, worked out from shapes alone, before a weight is read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

from megascale.config.model import ModelConfig
from megascale.errors import CheckpointError
from megascale.model.axes import ONE_RANK
from megascale.model.families.hf_names import exchange_of
from megascale.model.transformer import Transformer

HEADER_ALIGNMENT = 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAFETENSORS_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
WEIGHTS_NAME = "model.safetensors"
Shape = tuple[int, ...]


class Unit(NamedTuple):
    """One of our parameters, and the tensors of theirs that it becomes; they lie in one file, one after the other.

    Attributes:
        name: our parameter's global name; None for a bias that transformers has and this model does not: zeros.
        shape: of our parameter.
        hf_tensors: (name, shape) of each of theirs.
    """

    name: str | None
    shape: Shape
    hf_tensors: tuple[tuple[str, Shape], ...]

    @property
    def numel(self) -> int:
        """Elements that are written."""
        return sum(prod(shape) for _, shape in self.hf_tensors)


@dataclass(frozen=True)
class Shard:
    """One safetensors file of an export."""

    file: str
    units: tuple[Unit, ...]
    dtype: str

    @property
    def data_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(unit.numel for unit in self.units) * DTYPES[self.dtype].itemsize

    @property
    def header(self) -> bytes:
        """Its length and header; the metadata is what transformers wants to see."""
        header, position = {"__metadata__": {"format": "pt"}}, 0
        for name, shape in (tensor for unit in self.units for tensor in unit.hf_tensors):
            stop = position + prod(shape) * DTYPES[self.dtype].itemsize
            header[name] = {
                "dtype": SAFETENSORS_NAMES[self.dtype], "shape": list(shape), "data_offsets": [position, stop],
            }
            position = stop
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % HEADER_ALIGNMENT)
        return len(text).to_bytes(8, "little") + text


def plan_units(config: ModelConfig) -> list[Unit]:
    """All parameters of a model in the order of its layers, and what they become.

    GPT-2 without biases gets zeros for them: transformers has no GPT-2 without, and a bias of zero changes nothing.
    """
    with torch.device("meta"):  # shapes without memory
        model = Transformer(config, ONE_RANK)
        units = []
        for place in model.placements().values():
            exchange = exchange_of(config, place.name)
            parts = exchange.split(torch.empty(place.global_shape))
            hf_tensors = tuple((name, tuple(t.shape)) for name, t in zip(exchange.hf_names, parts, strict=True))
            units.append(Unit(place.name, place.global_shape, hf_tensors))
            if config.family == "gpt2" and not config.has_bias:
                units += _zero_biases(place.name, hf_tensors)
    return units


def plan_shards(units: Sequence[Unit], dtype: str, max_shard_bytes: int) -> list[Shard]:
    """Deals units out to files, in order, each as full as `max_shard_bytes` allows; a larger unit has its own."""
    groups: list[list[Unit]] = []
    space_bytes = 0
    for unit in units:
        unit_bytes = unit.numel * DTYPES[dtype].itemsize
        if not groups or unit_bytes > space_bytes:
            groups.append([])
            space_bytes = max_shard_bytes
        groups[-1].append(unit)
        space_bytes -= unit_bytes
    if len(groups) == 1:
        return [Shard(WEIGHTS_NAME, tuple(groups[0]), dtype)]
    return [
        Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group), dtype)
        for number, group in enumerate(groups, start=1)
    ]


def derive_weight_map(shards: Sequence[Shard]) -> dict:
    """The values of `model.safetensors.index.json`, with which transformers finds a tensor's file."""
    return {
        "metadata": {"total_size": sum(shard.data_bytes for shard in shards)},
        "weight_map": {
            name: shard.file for shard in shards for unit in shard.units for name, _ in unit.hf_tensors
        },
    }


def check_shapes(units: Sequence[Unit], stored: Mapping[str, Shape], place: str) -> None:
    """Refuses a checkpoint whose weights aren't those of its own config.

    Args:
        stored: shape by parameter name.
        place: of the checkpoint, for the message.

    Raises:
        CheckpointError: a parameter that is missing, in another shape, or unknown to the model.
    """
    wanted = {unit.name: unit.shape for unit in units if unit.name is not None}
    for name in sorted(wanted.keys() | stored.keys()):
        if wanted.get(name) != stored.get(name):
            raise CheckpointError(
                f"{place}: {name} has shape {stored.get(name, 'none: it is missing')}, by the checkpoint's own config"
                f" it is {wanted.get(name, 'none: no such parameter')}; the two don't belong together"
            )


def _zero_biases(name: str, hf_tensors: Sequence[tuple[str, Shape]]) -> list[Unit]:
    """Zeros for the bias that belongs to a weight of GPT-2: as long as the weight's last dim, stored (in, out)."""
    if name.startswith(("embedding.", "head.")):
        return []
    return [
        Unit(None, (), ((f"{hf_name.removesuffix('.weight')}.bias", (shape[-1],)),)) for hf_name, shape in hf_tensors
    ]
