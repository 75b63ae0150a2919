"""The root module: this rank's layers of a model under their global names.

Shapes: B rows, T positions, D d_model, V padded vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import nn

from megascale.config.model import ModelConfig
from megascale.model.axes import ONE_RANK, Axes
from megascale.model.context import Context, build_context
from megascale.model.init import initial_value
from megascale.model.registry import FAMILIES, SHARED
from megascale.model.sharding import rule_of
from megascale.model.stage import Stage
from megascale.parallel.axis import ALONE
from megascale.parallel.boxes import Box
from megascale.parallel.placement import Placement

BLOCKS = "blocks."


class Transformer(nn.Module):
    """An ordered list of layers with global names such as `blocks.0.attention.qkv.weight`.

    Args:
        config: the model's shape.
        axes: the ranks that share its layers.
        stages: indices of the layers of each stage of this rank; None for one stage that has them all.

    Attributes:
        specs: the whole list as data.
        own_specs: the part of it that this rank has.
        shared_specs: modules that layers of several stages use; each pipeline rank holds all of them.
        copies: name here -> global name, of tied parameters whose original another rank has.
        stages: this rank's stages, which refer to its layers.
    """

    def __init__(self, config: ModelConfig, axes: Axes, stages: Sequence[Sequence[int]] | None = None):
        super().__init__()
        self.config, self.axes = config, axes
        self.specs = tuple(FAMILIES[config.family](config, axes))
        stages = [range(len(self.specs))] if stages is None else stages
        self.own_specs = tuple(self.specs[index] for index in sorted(index for stage in stages for index in stage))
        list_shared = SHARED.get(config.family)
        self.shared_specs = tuple(list_shared(config, axes)) if list_shared else ()
        for spec in (*self.shared_specs, *self.own_specs):
            parent_name, _, own_name = spec.name.rpartition(".")
            self._container(parent_name).add_module(own_name, spec.build())
        self.copies = self._tie()
        self.stages = [self._stage(indices) for indices in stages]

    @property
    def layers(self) -> list[nn.Module]:
        """This rank's layers, first to last."""
        return [self.get_submodule(spec.name) for spec in self.own_specs]

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.parameters()).device

    def forward(
        self,
        tokens_BT: torch.Tensor,
        context: Context | None = None,
        labels_BT: torch.Tensor | None = None,
        last_B: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss of the labels, or without them the logits of the token after each position, in the model's dtype.

        For models that this rank has whole. Given `last_B`, the head sees that position of each row only, which is all
        that generation needs.

        Shape: (B, T) int64 to an fp32 scalar (sum over the labels, in nats); or to (B, T, V); or with `last_B` (B)
            int64 to (B, V). Ids from `vocab_size` on get minus infinity.
        """
        context = context or build_context(self.config, tokens_BT.shape[1], tokens_BT.device, self.axes)
        (stage,) = self.stages
        return stage(tokens_BT, context, labels_BT, last_B)

    def placements(self) -> dict[nn.Parameter, Placement]:
        """Where each parameter of this rank lies in the whole model, in the order of `named_parameters`."""
        return {parameter: self._placement(name, parameter) for name, parameter in self.named_parameters()}

    def _placement(self, own_name: str, parameter: nn.Parameter) -> Placement:
        name, tp = self.copies.get(own_name, own_name), self.axes.tp
        rule, shape = rule_of(name), list(parameter.shape)
        starts, is_whole = [0] * len(shape), rule.tp_dim is None
        for axis, dim in ((tp, rule.tp_dim), (self.axes.ep, rule.ep_dim)):
            if dim is not None:
                starts[dim] = axis.rank * shape[dim]
                shape[dim] *= axis.size
        stops = (start + size for start, size in zip(starts, parameter.shape, strict=True))
        is_partial = is_whole and (self.axes.is_sequence_parallel or rule.is_per_head)
        partial_over = tp if is_partial else ALONE
        if name in self._split_ties():
            partial_over = self.axes.ends
        is_counted = own_name not in self.copies and (tp.rank == 0 or not is_whole)
        if any(name.startswith(f"{spec.name}.") for spec in self.shared_specs):
            partial_over, is_counted = self.axes.pp, is_counted and self.axes.pp.rank == 0
        is_expert = rule.ep_dim is not None and self.axes.ep.size > 1
        box = Box(tuple(starts), tuple(stops))
        return Placement(name, tuple(shape), box, is_counted, partial_over, is_expert)

    def _split_ties(self) -> set[str]:
        """Names of tied parameters of which this rank has one use and another rank the other."""
        return {
            target
            for spec in self.specs
            for own_name, target in spec.tied.items()
            if self._holds(target) != self._holds(f"{spec.name}.{own_name}")
        }

    def _tie(self) -> dict[str, str]:
        """Makes tied parameters one; gives those that stand here alone, with the name of which each is a copy."""
        copies = {}
        for spec in self.own_specs:
            for own_name, target in spec.tied.items():
                full_name = f"{spec.name}.{own_name}"
                if self._holds(target):
                    parent_name, _, parameter_name = full_name.rpartition(".")
                    setattr(self.get_submodule(parent_name), parameter_name, self.get_parameter(target))
                else:
                    copies[full_name] = target
        return copies

    def _holds(self, parameter_name: str) -> bool:
        specs = (*self.shared_specs, *self.own_specs)
        return any(parameter_name.startswith(f"{spec.name}.") for spec in specs)

    def _container(self, name: str) -> nn.Module:
        """The module that holds the layers whose names begin with `name`; made when the first of them is added."""
        module: nn.Module = self
        for part in name.split(".") if name else ():
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        return module

    def _stage(self, indices: Sequence[int]) -> Stage:
        layers = [self.get_submodule(self.specs[index].name) for index in indices]
        ends_model = indices[-1] == len(self.specs) - 1
        return Stage(layers[:-1], layers[-1]) if ends_model else Stage(layers, None)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Unsharded shape of each parameter, by its global name; nothing is allocated."""
    with torch.device("meta"):
        return {place.name: place.global_shape for place in Transformer(config, ONE_RANK).placements().values()}


def build_model(
    config: ModelConfig, seed: int, axes: Axes = ONE_RANK, stages: Sequence[Sequence[int]] | None = None
) -> Transformer:
    """This rank's part of a model in fp32 on the CPU, every parameter initialised by its name and the seed."""
    model = Transformer(config, axes, stages)
    with torch.no_grad():
        for parameter, place in model.placements().items():
            parameter.copy_(initial_value(place.name, place.global_shape, config, seed)[place.box.slices])
    return model


def compile_blocks(model: Transformer, backend: str = "inductor") -> None:
    """Compiles each block in place by `torch.compile`, without a change of parameter names.

    Equal blocks share one compiled graph, so start-up costs the same for 2 layers and for 100.
    """
    for spec, layer in zip(model.own_specs, model.layers, strict=True):
        if BLOCKS in spec.name:
            layer.compile(backend=backend)
