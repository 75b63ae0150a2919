"""Bytes that a rank holds on its device, in closed form and without torch: training state, activations, working memory.

Symbols: P parameters of this rank after tp and pp, n = dp x cp ranks of ZeRO, e bytes of a parameter and activation,
B rows, A positions of the residual stream before tp, D d_model, v rows of the vocabulary on this rank.

State and a block's activations are what `bench.memory` measures on real ranks, to 2 % (docs/parallelism.md); the sum of
all was not measured. Left out: the device's context, buffers of collectives, gradients of activations and workspaces of
kernels while a block runs, what the allocator can't reuse, the decoder of a MAE and the transform in BERT's head. A
compiled block may keep more or less.
"""

from dataclasses import dataclass

from megascale.config.derive import Derived
from megascale.config.schedules import num_rounds
from megascale.config.schema import RunConfig
from megascale.model.block_memory import (
    Place,
    block_places,
    kept_of_block,
    kept_of_halves,
    kept_of_products,
    stream_bytes,
)
from megascale.model.rank_share import RankShare

PERSISTENT = 100_000
"""Elements of a parameter below which DeepSpeed's ZeRO-3 keeps it whole."""
GATHERED = 1_000_000_000
"""Elements that DeepSpeed's ZeRO-3 holds gathered at most."""
BUCKET_ELEMENTS = 50_000_000
"""Gradients on their way at once in ZeRO-2 and 3 (`megascale.engine.ds_config`)."""
LOGITS_ELEMENTS = 2**26
"""Logits treated at a time (`megascale.model.loss`)."""
GIB = 2**30


@dataclass(frozen=True)
class State:
    """Bytes of a rank's part of the training state between two steps."""

    parameters: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer


def state_bytes(share: RankShare) -> State:
    """ZeRO's bytes (Rajbhandari et al. 2020, section 3.1) with gradients in fp32.

    | ZeRO  | parameters | gradients       | optimizer, 16 bits | optimizer, fp32 |
    |-------|------------|-----------------|--------------------|-----------------|
    | 0     | e P        | 4 P             | 12 P               | 8 P             |
    | 1     | e P        | 4 P             | 12 P / n           | 8 P / n         |
    | 2     | e P        | 4 P / n         | 12 P / n           | 12 P / n        |
    | 3     | e P / n    | 4 P / n         | 12 P / n           | 12 P / n        |

    In ZeRO-0 and 1 an fp32 parameter is its own master. DeepSpeed's ZeRO-2 and 3 copy it. ZeRO-3 also keeps parameters
    of less than 1e5 elements whole. With expert parallelism the optimizer's n is n / ep for experts.
    """
    total, ranks, stage = share.parameters.total, share.zero_ranks, share.parallel.zero_stage
    experts = share.parameters.experts
    is_own_master = share.bytes == 4 and stage < 2
    gradients = {0: 4 * total, 1: 4 * total}
    parameters = share.bytes * total
    if stage == 3:
        parameters = parameters / ranks + share.bytes * small_parameters(share)
    return State(
        parameters=parameters,
        gradients=gradients.get(stage, 4 * total / ranks),
        optimizer=((0 if is_own_master else 4) + kept_per_element(share)) * (
            (total - experts) / ranks + experts * share.parallel.ep / ranks if stage >= 1 else total
        ),
    )


def kept_per_element(share: RankShare) -> float:
    """Bytes per element that the optimizer keeps besides the master; a mean over this rank's parameters.

    AdamW 8, Lion 4; Muon 4 for matrices of blocks and 8 for the rest; Adafactor 4 for vectors and next to nothing for
    matrices. 4 more for an average of the weights. The table above is AdamW's.
    """
    optimizer, count = share.config.optimizer, share.parameters
    table = share.model.padded_vocab_size * share.model.d_model // share.parallel.tp
    tables = table * (share.has_embedding + (share.has_head and not share.model.is_tied))
    kept = {
        "adamw": 8 * count.total, "lion": 4 * count.total, "adafactor": 4 * count.vectors,
        "muon": 4 * (count.total + min(tables, count.matrices) + count.vectors),
    }[optimizer.kind]
    return kept / max(1, count.total) + (4 if optimizer.ema_decay is not None else 0)


def small_parameters(share: RankShare) -> int:
    """Elements of this rank's parameters that DeepSpeed's ZeRO-3 keeps whole."""
    return share.parameters.vectors + sum(size for size in share.matrix_sizes if size < PERSISTENT)


def passes_under_way(schedule: str, pp: int, stages_per_rank: int, micro_batches: int, pp_rank: int) -> int:
    """Most forward passes of one stage whose activations a pipeline rank holds at once: those of torch's schedules.

    gpipe: all. 1f1b: one for each rank from it on. interleaved_1f1b: a round of each stage but the last, then two for
    each rank after it and one. The others hold back weight gradients until every rank holds as much as the first.

    Source: Narayanan et al. 2021, arXiv 2104.04473, section 2.2; Qi et al. 2023, arXiv 2401.10241; DeepSeek-AI 2024,
        arXiv 2412.19437, section 3.2.1.

    >>> [passes_under_way("interleaved_1f1b", 4, 2, 16, rank) for rank in range(4)]
    [11, 9, 7, 5]
    """
    if pp == 1:
        return 1
    rounds = (stages_per_rank - 1) * (micro_batches // num_rounds(pp, micro_batches))
    most = {
        "gpipe": micro_batches,
        "1f1b": pp - pp_rank,
        "interleaved_1f1b": rounds + 2 * (pp - 1 - pp_rank) + 1,
        "zero_bubble": rounds + pp,
        "zero_bubble_v": 2 * pp,
        "dualpipe_v": 2 * pp + 1,
    }[schedule]
    return min(most, stages_per_rank * micro_batches)


@dataclass(frozen=True)
class ExpectedMemory:
    """Bytes that a rank needs on its device at the fullest moment of a step.

    Attributes:
        pp_rank: its place in the pipeline; all ranks of one place need the same.
        activations: kept for the backward pass, of all micro-batches under way.
        working: what a moment needs beside: a block computed again, or a chunk of logits and the gradients of the head;
            in ZeRO-2 and 3 also the bucket of gradients, in ZeRO-3 the gathered parameters.
    """

    pp_rank: int
    parameters: float
    gradients: float
    optimizer: float
    activations: float
    working: float

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.working


def fullest_rank(config: RunConfig, derived: Derived) -> ExpectedMemory:
    """What the ranks need that need most; the first of them in the pipeline."""
    layout = RankShare(config, derived, 0).layout
    places = [layout.rank_at({"pp": pp_rank, "dp": 0, "cp": 0, "tp": 0}) for pp_rank in range(layout.pp)]
    return max((expected_memory(RankShare(config, derived, rank)) for rank in places), key=lambda each: each.total)


def expected_memory(share: RankShare) -> ExpectedMemory:
    """What a rank needs, on a GPU."""
    state = state_bytes(share)
    return ExpectedMemory(
        pp_rank=share.at["pp"],
        parameters=state.parameters,
        gradients=state.gradients,
        optimizer=0.0 if share.parallel.offload_optimizer == "cpu" else state.optimizer,
        activations=activation_bytes(share),
        working=working_bytes(share),
    )


def activation_bytes(share: RankShare) -> float:
    """Passes under way times what the rank's fullest stage keeps: its blocks, and the hidden state that it gives on.

    Offloaded, only the products that `recompute: selective` keeps stay.
    """
    parallel, train = share.parallel, share.train
    places = block_places(share.model)
    stages = [[places[layer] for layer in share.stage_plan[stage] if layer in places] for stage in share.stages]
    kept = [
        sum(kept_on_device(share, place, place.number % train.recompute_every == 0) for place in blocks)
        + stream_bytes(share)
        for blocks in stages
    ]
    passes = passes_under_way(
        parallel.schedule, parallel.pp, parallel.stages_per_rank, share.micro_batches, share.at["pp"])
    return passes * max(kept)


def kept_on_device(share: RankShare, place: Place, is_chosen: bool) -> float:
    """What a block keeps on the device."""
    if not share.train.offload_activations:
        return kept_of_block(share, place, is_fused=True, is_chosen=is_chosen)
    again = share.train.recompute_parts if is_chosen and share.train.recompute == "selective" else ()
    return kept_of_products(share, place, again)


def working_bytes(share: RankShare) -> float:
    """The most that one moment of a step needs beside state and kept activations.

    A block of the backward pass needs what it would have kept without recompute. The loss keeps B A D + 2 v D elements
    of gradients (fp32: one v D), of each micro-batch in gpipe and of one else. It needs for a while 4 v D bytes of
    fp32, and a chunk of logits, as they are, in fp32 and as gradients.
    """
    parallel, size = share.parallel, share.bytes
    at_block = max(
        kept_of_halves(share, place, (), is_fused=True) - kept_of_block(share, place, is_fused=True)
        for place in set(block_places(share.model).values())
    )
    at_loss = 0.0
    if share.has_head:
        table = share.model.padded_vocab_size * share.model.d_model // parallel.tp
        kept = share.hidden + (2 if size == 2 else 1) * table * size
        times = share.micro_batches if parallel.schedule == "gpipe" and parallel.pp > 1 else 1
        logits = share.hidden // (size * share.model.d_model) * table // share.model.d_model
        at_loss = times * kept + 4 * table + (4 + 2 * size) * min(logits, LOGITS_ELEMENTS)
    total = share.parameters.total
    bucket = 4 * min(total, BUCKET_ELEMENTS) if parallel.zero_stage >= 2 else 0
    gathered = size * min(total, GATHERED) if parallel.zero_stage == 3 else 0
    return max(at_block, at_loss) + bucket + gathered
