"""What one rank of a layout holds of the model: its stages, layers and parameters, counted without torch."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property

from megascale.config.derive import Derived
from megascale.config.model import ModelConfig
from megascale.config.schema import RunConfig
from megascale.config.target import target_len
from megascale.config.vision import num_visible_patches
from megascale.model.flops import block_layers, layer_costs, sum_forms
from megascale.model.layer_forms import MASKED_PATCHES
from megascale.parallel.layout import Layout
from megascale.parallel.stages import plan_stages, stages_of_rank

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
ALIGNMENT = 2
"""Each rank's share of a flat parameter group is a multiple of this many elements."""


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of one rank by how the engine treats them.

    Attributes:
        matrices, vectors: decayed and other ones; each kind is one flat group.
        whole_matrices, whole_vectors: those of them that tp doesn't cut.
        experts: those of the matrices that ep cuts.
        tied: rows of a tied table of which the pipeline's other end has a copy.
    """

    matrices: int
    vectors: int
    whole_matrices: int
    whole_vectors: int
    tied: int
    experts: int = 0

    @property
    def total(self) -> int:
        return self.matrices + self.vectors


@cache
def planned_stages(
    model: ModelConfig, seq_len: int, target_len: int, num_stages: int, stage_layers: tuple[int, ...] | None
) -> list[range]:
    """Layers of every stage; once for all ranks, since a balanced cut of 100 layers takes a third of a second."""
    return plan_stages(layer_costs(model, seq_len, target_len), num_stages, stage_layers)


class RankShare:
    """What one rank of a run has of the model and of a step.

    Attributes:
        at: its place on each axis.
        zero_ranks: ranks that ZeRO shares out over, dp x cp.
        expert_ranks: those of them that hold the same experts.
        bytes: of a parameter and of an activation.
        micro_batches: of a step.
    """

    def __init__(self, config: RunConfig, derived: Derived, rank: int):
        self.config, self.derived = config, derived
        self.model, self.parallel, self.train = config.model, config.parallel, config.train
        parallel = self.parallel
        self.layout = Layout(pp=parallel.pp, dp=derived.dp, cp=parallel.cp, tp=parallel.tp, ep=parallel.ep)
        self.at = self.layout.coordinates(rank)
        self.zero_ranks = derived.dp * self.parallel.cp
        self.expert_ranks = self.zero_ranks // self.parallel.ep
        self.bytes = BYTES[config.precision.dtype]
        self.micro_batches = derived.num_micro_batches

    @cached_property
    def stage_plan(self) -> list[range]:
        """Layers of every stage of the model."""
        parallel, lengths = self.parallel, (self.train.seq_len, target_len(self.config))
        return planned_stages(self.model, *lengths, parallel.num_stages, parallel.stage_layers)

    @cached_property
    def stages(self) -> list[int]:
        """Stages of this rank."""
        parallel = self.parallel
        return stages_of_rank(parallel.schedule, parallel.pp, parallel.stages_per_rank, self.at["pp"])

    @cached_property
    def layers(self) -> set[int]:
        """Numbers of this rank's layers in the model's list."""
        return {layer for stage in self.stages for layer in self.stage_plan[stage]}

    @property
    def has_embedding(self) -> bool:
        return 0 in self.layers

    @property
    def has_head(self) -> bool:
        return self.stage_plan[-1][-1] in self.layers

    @property
    def num_blocks(self) -> int:
        return len(self.layers & block_layers(self.model))

    def positions_of(self, stack: str) -> int:
        """Positions of a row in a stack of blocks on this rank, before tp cuts them: of images the visible patches."""
        vision = self.model.vision
        if vision is not None:
            hidden = vision.num_patches - num_visible_patches(vision.num_patches, MASKED_PATCHES)
            return vision.num_positions - hidden * vision.is_mae
        return target_len(self.config) if stack == "decoder" else self.derived.attention_columns

    @property
    def positions(self) -> int:
        """Positions of a row in the residual stream: of both stacks, where there are two."""
        return self.positions_of("") + self.positions_of("decoder") * self.model.traits.has_decoder

    @property
    def hidden(self) -> int:
        """Bytes of the hidden state of a micro-batch, before tp cuts it."""
        return self.train.micro_batch_size * self.positions * self.model.d_model * self.bytes

    @cached_property
    def matrix_sizes(self) -> list[int]:
        """Elements of each decayed parameter of this rank."""
        tp, form = self.parallel.tp, sum_forms(self.model, self.layers)
        sizes = [size // {"cut": tp, "whole": 1, "experts": tp * self.parallel.ep}[kind] for kind, size in form.pieces]
        has_copy = self.model.is_tied and self.has_head and not self.has_embedding
        return sizes + [self.model.padded_vocab_size * self.model.d_model // tp] * has_copy

    @cached_property
    def parameters(self) -> ParameterCounts:
        """This rank's parameters, without padding."""
        model, tp = self.model, self.parallel.tp
        form = sum_forms(model, self.layers)
        table = model.padded_vocab_size * model.d_model // tp
        has_copy = model.is_tied and self.has_head and not self.has_embedding
        experts = form.experts // (tp * self.parallel.ep)
        return ParameterCounts(
            matrices=form.cut_matrices // tp + form.whole_matrices + experts + table * has_copy,
            vectors=form.cut_vectors // tp + form.whole_vectors,
            whole_matrices=form.whole_matrices,
            whole_vectors=form.whole_vectors,
            tied=table if model.is_tied and self.has_embedding != self.has_head else 0,
            experts=experts,
        )

    @property
    def num_sparse(self) -> int:
        """Sparse blocks of this rank."""
        blocks = sorted(block_layers(self.model))
        return len(self.layers & {blocks[index] for index in self.model.sparse_blocks})

    def flat_parameters(self, ranks: int) -> int:
        """Elements of both flat groups with their padding, each shared out over some ranks. With expert parallelism
        those of experts aren't among them."""
        counts = self.parameters
        return padded((counts.matrices - (counts.experts if self.parallel.ep > 1 else 0), counts.vectors), ranks)

    def flat_experts(self, ranks: int) -> int:
        """The same of the groups into which expert parallelism puts experts; there are no vectors among them."""
        return padded((self.parameters.experts, 0), ranks) if self.parallel.ep > 1 else 0


def padded(groups: Iterable[int], ranks: int) -> int:
    """Elements of flat groups with their padding; an empty one has padding only."""
    unit = ALIGNMENT * ranks
    return sum(max(1, -(-group // unit)) * unit for group in groups)
