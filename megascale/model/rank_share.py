"""What one rank of a layout holds of the model: its stages, layers and parameters, counted without torch."""

from dataclasses import dataclass
from functools import cache, cached_property

from megascale.config.derive import Derived
from megascale.config.model import ModelConfig
from megascale.config.schema import RunConfig
from megascale.model.flops import layer_costs, num_block_weights
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
        tied: rows of a tied table of which the pipeline's other end has a copy.
    """

    matrices: int
    vectors: int
    whole_matrices: int
    whole_vectors: int
    tied: int

    @property
    def total(self) -> int:
        return self.matrices + self.vectors


@cache
def planned_stages(
    model: ModelConfig, seq_len: int, num_stages: int, stage_layers: tuple[int, ...] | None
) -> list[range]:
    """Layers of every stage; once for all ranks, since a balanced cut of 100 layers takes a third of a second."""
    return plan_stages(layer_costs(model, seq_len), num_stages, stage_layers)


class RankShare:
    """What one rank of a run has of the model and of a step.

    Attributes:
        at: its place on each axis.
        zero_ranks: ranks that ZeRO shares out over, dp x cp.
        bytes: of a parameter and of an activation.
        micro_batches: of a step.
    """

    def __init__(self, config: RunConfig, derived: Derived, rank: int):
        self.config, self.derived = config, derived
        self.model, self.parallel, self.train = config.model, config.parallel, config.train
        self.layout = Layout(pp=self.parallel.pp, dp=derived.dp, cp=self.parallel.cp, tp=self.parallel.tp)
        self.at = self.layout.coordinates(rank)
        self.zero_ranks = derived.dp * self.parallel.cp
        self.bytes = BYTES[config.precision.dtype]
        self.micro_batches = derived.num_micro_batches

    @cached_property
    def stage_plan(self) -> list[range]:
        """Layers of every stage of the model."""
        return planned_stages(self.model, self.train.seq_len, self.parallel.num_stages, self.parallel.stage_layers)

    @cached_property
    def stages(self) -> list[int]:
        """Stages of this rank."""
        parallel = self.parallel
        return stages_of_rank(parallel.schedule, parallel.pp, parallel.stages_per_rank, self.at["pp"])

    @cached_property
    def layers(self) -> set[int]:
        """Layers of this rank: 0 the embedding, 1 to L the blocks, then the final norm and the head."""
        return {layer for stage in self.stages for layer in self.stage_plan[stage]}

    @property
    def has_embedding(self) -> bool:
        return 0 in self.layers

    @property
    def has_norm(self) -> bool:
        return self.model.num_layers + 1 in self.layers

    @property
    def has_head(self) -> bool:
        return self.model.num_layers + 2 in self.layers

    @property
    def num_blocks(self) -> int:
        return len(self.layers & set(range(1, self.model.num_layers + 1)))

    @property
    def hidden(self) -> int:
        """Bytes of the hidden state of a micro-batch, at all positions of attention."""
        return self.train.micro_batch_size * self.derived.attention_columns * self.model.d_model * self.bytes

    @cached_property
    def parameters(self) -> ParameterCounts:
        """This rank's parameters, without padding."""
        model, tp = self.model, self.parallel.tp
        table = model.padded_vocab_size * model.d_model // tp
        positions = model.max_seq_len * model.d_model if model.traits.positions == "learned" else 0
        norm = model.d_model * (2 if model.traits.norm == "layer" and model.has_bias else 1)
        qkv_biases = (model.num_heads + 2 * model.kv_heads) * model.head_dim
        up_biases = model.ffn_dim * (2 if model.is_gated else 1)
        cut_biases = (qkv_biases + up_biases) // tp if model.has_bias else 0
        whole_vectors = self.num_blocks * (2 * norm + 2 * model.d_model * model.has_bias) + norm * self.has_norm
        holds_tie_twice = model.is_tied and self.has_embedding and self.has_head
        tables = self.has_embedding + self.has_head - holds_tie_twice
        whole_matrices = positions * self.has_embedding
        return ParameterCounts(
            matrices=self.num_blocks * num_block_weights(model) // tp + table * tables + whole_matrices,
            vectors=self.num_blocks * cut_biases + whole_vectors,
            whole_matrices=whole_matrices,
            whole_vectors=whole_vectors,
            tied=table if model.is_tied and self.has_embedding != self.has_head else 0,
        )

    def flat_parameters(self, ranks: int) -> int:
        """Elements of both flat groups with their padding, each shared out over some ranks."""
        unit = ALIGNMENT * ranks
        return sum(max(1, -(-group // unit)) * unit for group in (self.parameters.matrices, self.parameters.vectors))
