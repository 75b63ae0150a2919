"""Bytes that a rank holds on its device, in closed form and without torch: training state, activations, working memory.

Symbols: P parameters of this rank after tp and pp, n = dp x cp ranks of ZeRO, e bytes of a parameter and activation,
B rows, A = T / cp positions of attention, t = A / tp with sequence shards and A without, D d_model, F d_ff, H heads, K
kv heads, C head_dim, p = tp, v rows of the vocabulary on this rank.

State and a block's activations are what `bench.memory` measures on real ranks, to 2 % (docs/parallelism.md); the sum of
all was not measured. Left out: the device's context, buffers of collectives, gradients of activations and workspaces of
kernels while a block runs, and what the allocator can't reuse. A compiled block may keep more or less.
"""

from dataclasses import dataclass

from megascale.config.derive import Derived
from megascale.config.schedules import num_rounds
from megascale.config.schema import RunConfig
from megascale.model.rank_share import RankShare

PERSISTENT = 100_000
"""Elements of a parameter below which DeepSpeed's ZeRO-3 keeps it whole."""
GATHERED = 1_000_000_000
"""Elements that DeepSpeed's ZeRO-3 holds gathered at most."""
BUCKET_ELEMENTS = 50_000_000
"""Gradients on their way at once in ZeRO-2 and 3 (`megascale.engine.ds_config`)."""
LOGITS_ELEMENTS = 2**26
"""Logits treated at a time (`megascale.model.loss`)."""
HALVES = ("attention", "feed_forward")
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
    """Elements of this rank's parameters that DeepSpeed's ZeRO-3 keeps whole; of a LLaMA, with its tables apart."""
    model, tp, blocks = share.model, share.parallel.tp, share.num_blocks
    table = model.padded_vocab_size * model.d_model // tp
    heads = (model.num_heads + 2 * model.kv_heads) * model.head_dim
    inner = model.ffn_dim * model.d_model // tp
    matrices = [table] * 2 + [heads * model.d_model // tp, model.d_model**2 // tp, 2 * inner, inner] * blocks
    return share.parameters.vectors + sum(size for size in matrices if size < PERSISTENT)


def kept_of_half(share: RankShare, half: str, *, is_again: bool, is_fused: bool) -> float:
    """Bytes that half a block keeps from its forward to its backward pass; the output not counted.

    In numbers of e bytes per position of attention unless told otherwise. Again: `recompute: selective` covers it.

    | what                                    | kept          | again     | over  | half         |
    |-----------------------------------------|---------------|-----------|-------|--------------|
    | input of the half                       | D             | D         | t     | both         |
    | statistics of the norm, fp32            | 1 or 2        |           | t     | both         |
    | input of the widening product           | D             |           | t     | both         |
    | product of queries, keys and values     | D + 2 K C     | D + 2 K C | A / p | attention    |
    | rotated queries and keys (llama)        | D + K C       |           | A / p | attention    |
    | attention's result, log-sum-exp in fp32 | D + H of fp32 |           | A / p | attention    |
    | widening product of the feed-forward    | F, llama 2 F  | as kept   | A / p | feed-forward |
    | after the activation (llama: also gate) | F, llama 2 F  |           | A / p | feed-forward |
    | moe: tokens to experts, their outputs   | 2 k D         | k D       | A     | feed-forward |

    In a moe F is the width of the k experts of a token and of the shared ones together, as if tokens were spread evenly
    over experts, and each block counts as sparse. `selective` keeps none of its products: the router's, which is small.
    Attention keeps no scores and dropout no masks: kernels and hashes compute them again. An RMS norm that isn't fused
    keeps its input and its normalised input in fp32, and in 16 bits not its input as it is. A CPU keeps the statistics
    of LayerNorm in e bytes.

    Args:
        is_fused: whether the RMS norm is one kernel, as on a GPU; on a CPU it is several, which keep more.
    """
    model, size = share.model, share.bytes
    width, is_llama = model.d_model, model.is_rotary
    keys = max(model.kv_heads, share.parallel.tp) * model.head_dim
    on_stream, product = width * size, (width + 2 * keys) * size
    rest = (width + (width + keys if is_llama else 0)) * size + 4 * model.num_heads
    if half == "feed_forward":
        product = rest = (2 if is_llama else 1) * model.ffn_dim * size
        if model.moe is not None:
            return kept_of_sparse_half(share, is_again=is_again)
    if is_again:
        return over_positions(share, on_stream, product)
    unfused = width * (4 if size == 4 else 8 - size) if is_llama and not is_fused else 0
    statistics = 4 if is_llama else 8 if is_fused else 2 * size
    return over_positions(share, 2 * on_stream + statistics + unfused, product + rest)


def kept_of_sparse_half(share: RankShare, *, is_again: bool) -> float:
    """What the sparse half of a block keeps, see `kept_of_half`; the RMS norm is one kernel."""
    model, moe, size = share.model, share.model.moe, share.bytes
    width, routed = model.d_model * size, moe.top_k * model.d_model * size * share.parallel.tp  # tp doesn't cut it
    if is_again:
        return over_positions(share, width, routed)
    inner = (moe.top_k + moe.num_shared_experts) * model.expert_dim * size
    return over_positions(share, 2 * width + 4, 2 * routed + (4 if model.is_gated else 2) * inner)


def kept_of_block(share: RankShare, *, is_fused: bool, is_chosen: bool = True) -> float:
    """Bytes that a block keeps on each rank, as the config's recompute says; the output is the next block's input.

    Args:
        is_chosen: whether `recompute_every` covers the block.
    """
    train = share.train
    if is_chosen and train.recompute == "full":
        return stream_bytes(share)
    again = train.recompute_parts if is_chosen and train.recompute == "selective" else ()
    return sum(kept_of_half(share, half, is_again=half in again, is_fused=is_fused) for half in HALVES)


def over_positions(share: RankShare, on_stream: float, cut: float) -> float:
    """Bytes of a micro-batch, from those per position of the residual stream and of the layers that tp cuts."""
    positions, tp = share.train.micro_batch_size * share.derived.attention_columns, share.parallel.tp
    return positions * (on_stream / (tp if share.parallel.is_sequence_parallel else 1) + cut / tp)


def stream_bytes(share: RankShare) -> float:
    """Bytes of the residual stream of a micro-batch on this rank."""
    return over_positions(share, share.model.d_model * share.bytes, 0)


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
    stages = [[layer for layer in share.stage_plan[stage] if 1 <= layer <= share.model.num_layers]
              for stage in share.stages]
    kept = [
        sum(kept_on_device(share, (layer - 1) % train.recompute_every == 0) for layer in blocks) + stream_bytes(share)
        for blocks in stages
    ]
    passes = passes_under_way(
        parallel.schedule, parallel.pp, parallel.stages_per_rank, share.micro_batches, share.at["pp"])
    return passes * max(kept)


def kept_on_device(share: RankShare, is_chosen: bool) -> float:
    """What a block keeps on the device."""
    kept = kept_of_block(share, is_fused=True, is_chosen=is_chosen)
    if not share.train.offload_activations:
        return kept
    again = share.train.recompute_parts if is_chosen and share.train.recompute == "selective" else ()
    return sum(kept_of_half(share, half, is_again=True, is_fused=True) - stream_bytes(share) for half in again)


def working_bytes(share: RankShare) -> float:
    """The most that one moment of a step needs beside state and kept activations.

    A block of the backward pass needs what it would have kept without recompute. The loss keeps B A D + 2 v D elements
    of gradients (fp32: one v D), of each micro-batch in gpipe and of one else. It needs for a while 4 v D bytes of
    fp32, and a chunk of logits, as they are, in fp32 and as gradients.
    """
    parallel, size = share.parallel, share.bytes
    whole = sum(kept_of_half(share, half, is_again=False, is_fused=True) for half in HALVES)
    at_block = whole - kept_of_block(share, is_fused=True)
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
