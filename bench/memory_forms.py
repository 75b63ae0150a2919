"""Bytes that a rank holds, in closed form: parameters, gradients, optimizer state, and a block's activations.

Symbols: P parameters of this rank after tp and pp, n = dp x cp ranks of ZeRO, e bytes of a parameter and activation,
B rows, A = T / cp positions of attention, t = A / tp with sequence shards and A without, D d_model, F d_ff, H heads, K
kv heads, C head_dim, p = tp.

Sources: Rajbhandari et al. 2020 (ZeRO), section 5; Korthikanti et al. 2022, sections 4 and 5, equations 1 to 6.
"""

from dataclasses import dataclass

from bench.comm_forms import RankShare
from bench.layout_cases import LayoutCase

PERSISTENT = 100_000
"""Elements of a parameter below which DeepSpeed's ZeRO-3 keeps it whole."""


@dataclass(frozen=True)
class State:
    """Bytes of a rank's part of the training state between two steps."""

    parameters: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer


def paper_state(case: LayoutCase, rank: int) -> State:
    """ZeRO's 2 + 2 + K bytes a parameter, K = 12: master and two moments; in fp32 4 + 4 + 8, without a master.

    Source: Rajbhandari et al. 2020, section 3.1 and figure 1.
    """
    share = RankShare(case, rank)
    total, ranks, stage = share.parameters.total, share.zero_ranks, share.parallel.zero_stage
    state_bytes = 8 if case.dtype == "fp32" else 12
    return State(
        parameters=share.bytes * total / (ranks if stage >= 3 else 1),
        gradients=share.bytes * total / (ranks if stage >= 2 else 1),
        optimizer=state_bytes * total / (ranks if stage >= 1 else 1),
    )


def our_state(case: LayoutCase, rank: int) -> State:
    """What we hold: ZeRO's bytes with gradients in fp32.

    | ZeRO  | parameters | gradients       | optimizer, 16 bits | optimizer, fp32 |
    |-------|------------|-----------------|--------------------|-----------------|
    | 0     | e P        | 4 P             | 12 P               | 8 P             |
    | 1     | e P        | 4 P             | 12 P / n           | 8 P / n         |
    | 2     | e P        | 4 P / n         | 12 P / n           | 12 P / n        |
    | 3     | e P / n    | 4 P / n         | 12 P / n           | 12 P / n        |

    In ZeRO-0 and 1 an fp32 parameter is its own master. DeepSpeed's ZeRO-2 and 3 copy it. ZeRO-3 also keeps parameters
    of less than 1e5 elements whole.
    """
    share = RankShare(case, rank)
    total, ranks, stage = share.parameters.total, share.zero_ranks, share.parallel.zero_stage
    is_own_master = case.dtype == "fp32" and stage < 2
    gradients = {0: 4 * total, 1: 4 * total}
    parameters = share.bytes * total
    if stage == 3:
        parameters = parameters / ranks + share.bytes * small_parameters(share)
    return State(
        parameters=parameters,
        gradients=gradients.get(stage, 4 * total / ranks),
        optimizer=(8 if is_own_master else 12) * total / (ranks if stage >= 1 else 1),
    )


def small_parameters(share: RankShare) -> int:
    """Elements of this rank's parameters that DeepSpeed's ZeRO-3 keeps whole; of a LLaMA, with its tables apart."""
    model, tp, blocks = share.model, share.parallel.tp, share.num_blocks
    table = model.padded_vocab_size * model.d_model // tp
    heads = (model.num_heads + 2 * model.kv_heads) * model.head_dim
    inner = model.ffn_dim * model.d_model // tp
    matrices = [table] * 2 + [heads * model.d_model // tp, model.d_model**2 // tp, 2 * inner, inner] * blocks
    return share.parameters.vectors + sum(size for size in matrices if size < PERSISTENT)


@dataclass(frozen=True)
class Kept:
    """What the forward pass of one block keeps for its backward pass.

    Attributes:
        paper: Korthikanti's form for the same sizes, see `paper_kept`.
        ours: exactly what our layers keep.
    """

    paper: float
    ours: float


def kept_of_block(case: LayoutCase, *, is_fused: bool) -> Kept:
    """Bytes that a block of this case keeps on each rank, the output not counted: it is the next block's input.

    Args:
        is_fused: whether the RMS norm is one kernel, as on a GPU; on a CPU it is several, which keep more.
    """
    return Kept(paper_kept(case), our_kept(case, is_fused=is_fused))


def paper_kept(case: LayoutCase) -> float:
    """`s b h (34 / t)` for selective, `s b h (34 + 5 a s / h) / t` for none, `2 s b h` for full; of a GPT-2 block.

    Without sequence shards 10 of the 34 aren't divided by t. Its 16-bit numbers, in our e bytes: 32 e / 2, without the
    dropout masks of one byte each (2 of the residual sums, and one of a s / h), of which we keep none.

    Source: Korthikanti et al. 2022, table 2 and equations 1 to 6.
    """
    share = RankShare(case, rank=0)
    train, tp = share.train, share.parallel.tp
    sbh = share.hidden / share.bytes * (share.bytes / 2)
    if train.recompute == "full":
        return 2 * sbh / (tp if share.parallel.is_sequence_parallel else 1)
    squares = 4 * share.model.num_heads * share.derived.attention_columns / share.model.d_model
    replicated, cut = (8, 24) if not share.parallel.is_sequence_parallel else (0, 32)
    return sbh * (replicated + cut / tp + (squares / tp if train.recompute == "none" else 0))


def our_kept(case: LayoutCase, *, is_fused: bool) -> float:
    """What our layers keep, in numbers of e bytes per position of attention unless told otherwise.

    | what                                    | none          | selective | full | over  |
    |-----------------------------------------|---------------|-----------|------|-------|
    | input of the block                      | D             | D         | D    | t     |
    | stream between the halves               | D             | D         |      | t     |
    | statistics of the norms, fp32           | 2 x 1 or 2    |           |      | t     |
    | inputs of both widening products        | 2 D           |           |      | t     |
    | product of queries, keys and values     | D + 2 K C     | D + 2 K C |      | A / p |
    | rotated queries and keys (llama)        | D + K C       |           |      | A / p |
    | attention's result, log-sum-exp in fp32 | D + H of fp32 |           |      | A / p |
    | widening product of the feed-forward    | F, llama 2 F  | as none   |      | A / p |
    | after the activation (llama: also gate) | F, llama 2 F  |           |      | A / p |

    Attention keeps no scores and dropout no masks: kernels and hashes compute them again. An RMS norm that isn't fused
    keeps its input and its normalised input in fp32, and in 16 bits not its input as it is. A CPU keeps the statistics
    of LayerNorm in e bytes.
    """
    share = RankShare(case, rank=0)
    model, train, parallel = share.model, share.train, share.parallel
    width, inner, size = model.d_model, model.ffn_dim, share.bytes
    is_llama, keys = model.family == "llama", max(model.kv_heads, parallel.tp) * model.head_dim
    stream = width * size
    if train.recompute == "full":
        on_stream, cut = stream, 0.0
    elif train.recompute == "selective":
        on_stream, cut = 2 * stream, (width + 2 * keys + (2 if is_llama else 1) * inner) * size
    else:
        unfused = width * (4 if size == 4 else 8 - size) if is_llama and not is_fused else 0
        statistics = 4 if is_llama else 8 if is_fused else 2 * size
        on_stream = 4 * stream + 2 * statistics + 2 * unfused
        cut = (width + 2 * keys + width + (width + keys if is_llama else 0)) * size + 4 * model.num_heads
        cut += (4 if is_llama else 2) * inner * size
    if not parallel.is_sequence_parallel:
        return positions_of(share) * (on_stream + cut / parallel.tp)
    return positions_of(share) * (on_stream + cut) / parallel.tp


def positions_of(share: RankShare) -> int:
    """Positions of attention of a micro-batch on a rank."""
    return share.train.micro_batch_size * share.derived.attention_columns
