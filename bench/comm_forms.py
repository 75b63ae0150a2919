"""How many bytes a rank sends in a step, in closed form: what the papers say, and by how much we are above it.

Symbols: L blocks of this rank, B rows of a micro-batch, M micro-batches, A = T / cp positions of attention, t = A / tp
with sequence shards and A without, D d_model, H heads, K kv heads, C head_dim, V padded vocabulary, P parameters of
this rank, e bytes of an activation and a parameter; S sparse blocks of this rank, E experts and k of a token, X
parameters of this rank's experts, which ep parts from P. A collective over n ranks of x bytes on its larger side sends
x (n-1)/n from each, an all-reduce twice that.

Sources: tensor parallelism Shoeybi et al. 2019, section 3; sequence shards Korthikanti et al. 2022, section 4.2.2;
ZeRO Rajbhandari et al. 2020, section 7; pipeline Narayanan et al. 2021, section 3.1; Ulysses Jacobs et al. 2023,
section 3.2; ring Liu et al. 2023, section 3; experts Lepikhin et al. 2020, section 3.2.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm

from bench.layout_cases import LayoutCase
from megascale.model.rank_share import RankShare
from megascale.parallel.stages import rank_of_stage


@dataclass(frozen=True)
class Term:
    """One kind of traffic of a rank.

    Attributes:
        axis, kind: as the counter names them.
        what: in words.
        formula: in the symbols above.
        sent: bytes per step.
        reason: why it is there though the paper moves nothing for it, or is saved; empty for the paper's own.
    """

    axis: str
    kind: str
    what: str
    formula: str
    sent: float
    reason: str = ""


def part(size: float, ranks: int) -> float:
    """What a rank sends in an all-gather, reduce-scatter or all-to-all whose larger side has this size."""
    return size * (ranks - 1) / ranks


def all_terms(case: LayoutCase, rank: int) -> list[Term]:
    """Everything that a rank sends in a step."""
    share = case.share(rank)
    makers = (tensor_terms, head_terms, expert_terms, partial_terms, context_terms, pipeline_terms, zero_terms,
              scalar_terms)
    return [term for make in makers for term in make(share) if term.sent]


def tensor_terms(share: RankShare) -> Iterator[Term]:
    """Tensor parallelism inside the blocks, and of the embedding."""
    tp, model = share.parallel.tp, share.model
    one = share.micro_batches * part(share.hidden, tp)
    halves = 2 * share.num_blocks + share.num_sparse * (model.moe is not None and model.moe.num_shared_experts > 0)
    blocks, embedding = one * halves / 2, one * share.has_embedding
    if not share.parallel.is_sequence_parallel:
        yield Term("tp", "all_reduce", "blocks: 2 sums forward, 2 backward", "8 L M BADe (n-1)/n", 8 * blocks)
        yield Term("tp", "all_reduce", "embedding: its output", "2 M BADe (n-1)/n", 2 * embedding)
    else:
        yield Term("tp", "all_gather", "blocks: 2 forward, 2 backward", "4 L M BADe (n-1)/n", 4 * blocks)
        yield Term("tp", "reduce_scatter", "blocks: 2 forward, 2 backward", "4 L M BADe (n-1)/n", 4 * blocks)
        yield Term("tp", "all_gather", "blocks: inputs again, for weight gradients", "(2 L - S) M BADe (n-1)/n",
                   one * (halves - share.num_sparse),
                   "only the shard is kept; in Korthikanti too, beside the count, behind the inputs' gradient")
        yield Term("tp", "reduce_scatter", "embedding: its output", "M BADe (n-1)/n", embedding)
        yield Term("tp", "all_gather", "embedding: gradient of it", "M BADe (n-1)/n", embedding)
    kv = max(1, tp // model.kv_heads)
    group = (model.num_heads // model.kv_heads + 2) * model.head_dim
    heads = share.num_blocks * share.micro_batches * part(share.hidden / model.d_model * group, kv)
    for kind, when in (("all_gather", "forward"), ("reduce_scatter", "backward")):
        yield Term("kv", kind, f"blocks: a kv head's group of heads, {when}", "L M BA (H/K + 2) C e (k-1)/k", heads,
                   "more tp ranks than kv heads: no parameter is held twice, so its product is shared instead")


def head_terms(share: RankShare) -> Iterator[Term]:
    """The head and the cross-entropy over a vocabulary that is cut."""
    tp = share.parallel.tp
    one = share.micro_batches * part(share.hidden, tp) * share.has_head
    if not share.parallel.is_sequence_parallel:
        yield Term("tp", "all_reduce", "head: gradient of its input", "2 M BADe (n-1)/n", 2 * one)
    else:
        yield Term("tp", "all_gather", "head: its input", "M BADe (n-1)/n", one)
        yield Term("tp", "reduce_scatter", "head: gradient of its input", "M BADe (n-1)/n", one)
    positions = share.train.micro_batch_size * share.derived.attention_columns * share.has_head
    yield Term("tp", "all_reduce", "cross-entropy: top score, sum, label's score of each position", "24 M BA (n-1)/n",
               2 * share.micro_batches * part(12 * positions, tp))


def expert_terms(share: RankShare) -> Iterator[Term]:
    """Tokens to the ranks of their experts and back. What a rank sends depends on its tokens; these are means over ep.

    tp ranks work on all positions of their shards together, each on its part of every expert's features.
    """
    parallel, moe = share.parallel, share.model.moe
    if not share.num_sparse:
        return
    times = share.num_sparse * share.micro_batches
    choices = share.train.micro_batch_size * share.derived.attention_columns * moe.top_k
    rows = times * part(choices * share.model.d_model * share.bytes, parallel.ep)
    for when in ("forward", "backward"):
        yield Term("ep", "all_to_all", f"tokens to experts and back, {when}", "2 S M BAkDe (n-1)/n", 2 * rows)
    yield Term("ep", "all_to_all", "how many tokens each expert gets", "8 S M E (n-1)/n",
               times * part(8 * moe.num_experts, parallel.ep), "no token is dropped and none padded: messages vary")
    why = "experts are cut over tp, and the router works on a rank's own positions"
    gates = times * part(4 * choices, parallel.tp)
    if parallel.is_sequence_parallel:
        yield Term("tp", "all_gather", "experts: choices and gates", "12 S M BAk (n-1)/n", 3 * gates, why)
        yield Term("tp", "reduce_scatter", "experts: gradient of gates", "4 S M BAk (n-1)/n", gates, why)
    else:
        yield Term("tp", "all_reduce", "experts: gradient of gates", "8 S M BAk (n-1)/n", 2 * gates, why)
    counts = 2 * times * part(8 * share.train.micro_batch_size * moe.num_experts, parallel.cp)
    yield Term("cp", "all_reduce", "experts: how often a row chose each", "16 S M BE (n-1)/n", counts,
               "the balance loss is of whole rows")


def partial_terms(share: RankShare) -> Iterator[Term]:
    """Gradients of which each rank of an axis has a part, summed in fp32."""
    counts, parallel = share.parameters, share.parallel
    whole = counts.whole_matrices + counts.whole_vectors
    if parallel.is_sequence_parallel:
        # ZeRO-0 and 1 sum once a step. ZeRO-2 and 3 reduce in every micro-batch, so this has to come before it.
        times = 1 if parallel.zero_stage < 2 else share.micro_batches
        sums = 2 * part(4 * whole, parallel.tp)
        yield Term("tp", "all_reduce", "gradients of norms and other whole parameters", "8 W (n-1)/n", sums)
        yield Term("tp", "all_reduce", "the same, in other micro-batches", "8 W (M-1) (n-1)/n", (times - 1) * sums,
                   "DeepSpeed's ZeRO-2 and 3 reduce gradients in every micro-batch")
    yield Term("ends", "all_reduce", "gradient of the tied table", "4 VD/tp", 2 * part(4 * counts.tied, 2))


def pipeline_terms(share: RankShare) -> Iterator[Term]:
    """Hidden states and their gradients between stages on different ranks."""
    parallel = share.parallel
    shards = parallel.tp if parallel.is_sequence_parallel else 1
    last = parallel.num_stages - 1

    def is_elsewhere(stage: int) -> bool:
        return 0 <= stage <= last and rank_of_stage(parallel.schedule, parallel.pp, stage) != share.at["pp"]

    sends = sum(is_elsewhere(stage + step) for stage in share.stages for step in (1, -1))
    yield Term("pp", "send", f"{sends} hidden states or gradients a micro-batch", "M BtDe each",
               sends * share.micro_batches * share.hidden / shards)


def context_terms(share: RankShare) -> Iterator[Term]:
    """Attention over positions that are cut."""
    parallel, model, cp = share.parallel, share.model, share.parallel.cp
    heads, kv_heads = model.num_heads // parallel.tp, max(1, model.kv_heads // parallel.tp)
    times = share.num_blocks * share.micro_batches
    head = times * share.hidden / model.d_model * model.head_dim  # bytes of one head in all blocks
    if parallel.context_attention == "ring":
        one = 2 * kv_heads * head * (cp - 1)
        yield Term("cp", "send", "keys and values, forward", "2 L M BAKC e (n-1)", one)
        yield Term("cp", "send", "keys and values again, backward", "2 L M BAKC e (n-1)", one)
        yield Term("cp", "send", "gradients of keys and values", "2 L M BAKC e (n-1)", one)
        yield Term("cp", "send", "the same in fp32", "2 L M BAKC (4 - e) (n-1)", one * (4 / share.bytes - 1),
                   "they add up on the way, over n ranks")
        return
    wide = lcm(kv_heads, cp)
    for when in ("forward", "backward"):
        yield Term("cp", "all_to_all", f"queries, keys, values and result, {when}", "L M BA (2H + 2K) C e (n-1)/n",
                   part(2 * (heads + kv_heads) * head, cp))
        yield Term("cp", "all_to_all", f"kv heads repeated, {when}", "L M BA (2K' - 2K) C e (n-1)/n",
                   part(2 * (wide - kv_heads) * head, cp), "n doesn't divide the kv heads")


def zero_terms(share: RankShare) -> Iterator[Term]:
    """Gradients and parameters over the ranks that hold the same ones."""
    makers = {0: whole_terms, 1: optimizer_share_terms, 2: gradient_share_terms, 3: parameter_share_terms}
    yield from makers[share.parallel.zero_stage](share)


def whole_terms(share: RankShare) -> Iterator[Term]:
    """ZeRO-0: as in plain data parallelism."""
    for axis, symbol, elements, ranks in divided_groups(share, is_shared=False):
        yield from gradient_terms(share, axis, symbol, "all_reduce", 2 * elements, ranks)


def optimizer_share_terms(share: RankShare) -> Iterator[Term]:
    """ZeRO-1."""
    for axis, symbol, elements, ranks in divided_groups(share, is_shared=True):
        yield from gradient_terms(share, axis, symbol, "reduce_scatter", elements, ranks)
        yield Term(axis, "all_gather", "parameters", f"{symbol} e (n-1)/n", part(share.bytes * elements, ranks))


def divided_groups(share: RankShare, *, is_shared: bool) -> Iterator[tuple[str, str, int, int]]:
    """(axis, symbol, elements with padding, ranks that hold the same) of the parameters, and of experts that ep parts
    from them: a rank's experts have seen the tokens of all its ep peers, so they have fewer replicas.

    Args:
        is_shared: whether the replicas share out the optimizer's state, which pads to a multiple of their number.
    """
    ranks, fewer = share.zero_ranks, share.expert_ranks
    yield "zero", "P", share.flat_parameters(ranks if is_shared else 1), ranks
    yield "experts", "X", share.flat_experts(fewer if is_shared else 1), fewer


def gradient_terms(
    share: RankShare, axis: str, symbol: str, kind: str, elements: int, ranks: int
) -> Iterator[Term]:
    """Gradients once a step."""
    factor = "2 " if kind == "all_reduce" else ""
    yield Term(axis, kind, "gradients", f"{factor}{symbol} e (n-1)/n", part(share.bytes * elements, ranks))
    yield Term(axis, kind, "the same in fp32", f"{factor}{symbol} (4 - e) (n-1)/n",
               part((4 - share.bytes) * elements, ranks),
               "sums over ranks and micro-batches are in fp32; the paper's are in 16 bits")


def gradient_share_terms(share: RankShare) -> Iterator[Term]:
    """ZeRO-2."""
    elements, ranks = share.flat_parameters(share.zero_ranks), share.zero_ranks
    yield from micro_batch_gradient_terms(share, "all_reduce")
    yield Term("zero", "all_reduce", "all-reduce, of which a rank keeps its share", "4 P M (n-1)/n",
               share.micro_batches * part(4 * share.parameters.total, ranks), "DeepSpeed has no reduce-scatter here")
    yield Term("zero", "all_gather", "parameters", "P e (n-1)/n", part(share.bytes * elements, ranks))


def parameter_share_terms(share: RankShare) -> Iterator[Term]:
    """ZeRO-3 of a model whose parameters all fit DeepSpeed's limit of 1e9 live ones, matrices over 1e5 elements.

    Rajbhandari et al. 2020, section 7.2.2, gather parameters for the forward and for the backward pass (3 P in all).
    DeepSpeed saves the second gather of so small a model, at the price of whole parameters between the two passes.
    """
    counts, ranks = share.parameters, share.zero_ranks
    yield from micro_batch_gradient_terms(share, "reduce_scatter")
    gathered = part(share.bytes * counts.matrices, ranks)
    yield Term("zero", "all_gather", "matrices, forward", "P e (n-1)/n", gathered)
    yield Term("zero", "all_gather", "matrices, backward", "P e (n-1)/n", gathered)
    yield Term("zero", "all_gather", "the latter, not sent", "- P e (n-1)/n", -gathered,
               "under 1e9 parameters DeepSpeed keeps them whole until then")
    yield Term("zero", "all_gather", "the same, in other micro-batches", "P e (M-1) (n-1)/n",
               (share.micro_batches - 1) * gathered, "given back after each backward pass")
    yield Term("zero", "all_gather", "vectors, once a step", "P e (n-1)/n", part(share.bytes * counts.vectors, ranks))


def micro_batch_gradient_terms(share: RankShare, kind: str) -> Iterator[Term]:
    """One share of the gradients, in every micro-batch."""
    counts, ranks = share.parameters, share.zero_ranks
    yield Term("zero", kind, "gradients", "P e (n-1)/n", part(share.bytes * counts.total, ranks))
    yield Term("zero", kind, "the same in fp32", "P (4 - e) (n-1)/n", part((4 - share.bytes) * counts.total, ranks),
               "sums over ranks and micro-batches are in fp32; the paper's are in 16 bits")
    yield Term("zero", kind, "the same, in other micro-batches", "4 P (M-1) (n-1)/n",
               (share.micro_batches - 1) * part(4 * counts.total, ranks),
               "a rank has room for its share of the gradients only")


def scalar_terms(share: RankShare) -> Iterator[Term]:
    """Loss, norm and overflow."""
    layout, stage = share.layout, share.parallel.zero_stage
    yield Term("loss", "all_reduce", "loss of the step", "8 (n-1)/n", 2 * part(4, layout.world_size // layout.tp))
    model_ranks = layout.pp * layout.tp
    if stage < 2:
        is_spread = stage == 1 or share.parallel.ep > 1
        axis, ranks = ("world", layout.world_size) if is_spread else ("model", model_ranks)
        yield Term(axis, "all_reduce", "gradient norm", "8 (n-1)/n", 2 * part(4, ranks))
        return
    is_checked = layout.tp > 1 or (stage == 2 and share.config.precision.dtype != "fp32")
    size = 2 * (4 if stage == 2 else 8) + is_checked
    for axis, ranks in (("zero", share.zero_ranks), ("model", model_ranks)):
        yield Term(axis, "all_reduce", "gradient norm of each group, overflow flag", f"{2 * size} (n-1)/n",
                   2 * part(size, ranks))
