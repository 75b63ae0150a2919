"""Bytes that a block keeps from its forward to its backward pass, in closed form and without torch.

In numbers of e bytes per position of the block's stack, unless told otherwise. What is on the stream is divided by tp
with sequence shards, what tp cuts always. Again: `recompute: selective` covers it.

| what                                    | kept           | again        | tp     | half         |
|-----------------------------------------|----------------|--------------|--------|--------------|
| input of the half                       | D              | D            | stream | both         |
| statistics of the norm, fp32            | 1 or 2         |              | stream | both         |
| input of the widening product           | D              |              | stream | both         |
| product of queries, keys and values     | (H + 2 K) C    | (H + 2 K) C  | cut    | attention    |
| rotated or normed queries and keys      | (H + K) C      |              | cut    | attention    |
| norms of heads: statistics in fp32      | H + K          |              | cut    | attention    |
| and queries set apart from their groups | H C            |              | cut    | attention    |
| attention's result, log-sum-exp in fp32 | H C + H fp32   |              | cut    | attention    |
| widening product of the feed-forward    | F, gated 2 F   | as kept      | cut    | feed-forward |
| after the activation (gated: also gate) | F, gated 2 F   |              | cut    | feed-forward |
| moe: tokens to experts, their outputs   | 2 k D          | k D          | no     | feed-forward |

Post-norm blocks keep as much: the sums that their norms read in place of the norms' results. A block in one piece
(palm) has one input, one norm and one input of its products, with sequence shards the gathered one; `selective` keeps
its input and both widening products. A decoder's first half has a second attention, to the source. For each of its
own positions it keeps D of the sum, D of its norm, H C of queries, H C and H of the result, and D + 2 H C for each
position of the source (2 H C with sequence shards); `selective` keeps none of these. A block of two stacks keeps its
input with the other stack's part, but not in post-norm without shards and without `selective`.

ReLU needs its result alone. In a sparse block F is the width of the k experts of a token and of the shared ones
together, as if tokens were spread evenly; `selective` keeps none of its products, and the router's is small.
Attention keeps no scores and dropout no masks: kernels and hashes compute them again; but a CPU keeps the scores of
T5's attention and of bent ones. An RMS norm that isn't fused keeps its input and its normalised input in fp32, and in
16 bits not its input as it is. A CPU keeps the statistics of LayerNorm in e bytes.

Legend: D d_model, F d_ff, H heads, K kv heads (tp at least), C head_dim, e bytes of an activation.
"""

from functools import cache
from typing import NamedTuple

from megascale.config.model import ModelConfig
from megascale.model.layer_forms import Lengths, layer_forms
from megascale.model.rank_share import RankShare

HALVES = ("attention", "feed_forward")


class Place(NamedTuple):
    """Where a block is: its stack (encoder, decoder, or empty where there is one), and its number there."""

    stack: str
    number: int


@cache
def block_places(model: ModelConfig) -> dict[int, Place]:
    """Each block by its number in the list of layers."""
    forms = enumerate(layer_forms(model, Lengths(1, 1)))
    named = {layer: form.name.split(".") for layer, form in forms if form.is_block}
    return {layer: Place(parts[0] if len(parts) > 2 else "", int(parts[-1])) for layer, parts in named.items()}


def kept_of_block(share: RankShare, place: Place, *, is_fused: bool, is_chosen: bool = True) -> float:
    """Bytes that a block keeps on each rank, as the config's recompute says; the output is the next block's input.

    Args:
        is_fused: whether the RMS norm is one kernel, as on a GPU; on a CPU it is several, which keep more.
        is_chosen: whether `recompute_every` covers the block.
    """
    train = share.train
    if is_chosen and train.recompute == "full":
        return stream_bytes(share)
    again = train.recompute_parts if is_chosen and train.recompute == "selective" else ()
    return kept_of_halves(share, place, again, is_fused=is_fused)


def kept_of_halves(share: RankShare, place: Place, again: tuple[str, ...], *, is_fused: bool) -> float:
    """The same with the halves that `selective` covers given."""
    if share.model.traits.order == "parallel":
        return kept_of_joined(share, is_again=bool(again), is_fused=is_fused)
    return sum(kept_of_half(share, place, half, is_again=half in again, is_fused=is_fused) for half in HALVES)


def kept_of_half(share: RankShare, place: Place, half: str, *, is_again: bool, is_fused: bool) -> float:
    """What half a block keeps; the output not counted."""
    model, stream = share.model, share.model.d_model * share.bytes
    own = share.positions_of(place.stack)
    if half == "feed_forward":
        if place.number in model.sparse_blocks:
            return kept_of_sparse_half(share, is_again=is_again)
        product, rest = feed_forward_bytes(share)
        if is_again:
            return over_positions(share, own, stream, product)
        return over_positions(share, own, 2 * stream + norm_bytes(share, is_fused), product + rest)
    product, rest = attention_bytes(share, is_fused=is_fused)
    is_sharded = share.parallel.is_sequence_parallel
    is_view = place.stack and (model.traits.order == "pre" or is_sharded or is_again)
    others = over_positions(share, share.positions - own, stream, 0) if is_view else 0
    if is_again:
        return over_positions(share, own, stream, product) + others
    kept = over_positions(share, own, 2 * stream + norm_bytes(share, is_fused), product + rest) + others
    if place.stack == "decoder":
        read = 2 * model.heads_dim * share.bytes + 4 * model.num_heads
        kept += over_positions(share, own, 2 * stream + norm_bytes(share, is_fused), read)
        source = 0 if is_sharded else stream  # a copy where rows lie apart; a shard is gathered from the input as it is
        kept += over_positions(share, share.positions_of("encoder"), source, 2 * model.heads_dim * share.bytes)
    return kept


def kept_of_products(share: RankShare, place: Place, again: tuple[str, ...]) -> float:
    """The part of it that is the widening products of the halves that `selective` covers: those aren't offloaded."""
    own, sizes = share.positions_of(place.stack), {
        "attention": attention_bytes(share, is_fused=True)[0], "feed_forward": feed_forward_bytes(share)[0]}
    if place.number in share.model.sparse_blocks:
        sizes["feed_forward"] = share.model.moe.top_k * share.model.d_model * share.bytes * share.parallel.tp
    return sum(over_positions(share, own, 0, sizes[half]) for half in again)


def kept_of_joined(share: RankShare, *, is_again: bool, is_fused: bool) -> float:
    """What a block in one piece keeps."""
    stream, parallel = share.model.d_model * share.bytes, share.parallel
    (qkv, attended), (widened, activated) = attention_bytes(share, is_fused=is_fused), feed_forward_bytes(share)
    if is_again:
        return over_positions(share, share.positions, stream, qkv + widened)
    gathered = stream * (parallel.tp if parallel.is_sequence_parallel else 1)  # whole on each rank
    on_stream = stream + gathered + norm_bytes(share, is_fused)
    return over_positions(share, share.positions, on_stream, qkv + attended + widened + activated)


def kept_of_sparse_half(share: RankShare, *, is_again: bool) -> float:
    """What the sparse half of a block keeps; the RMS norm is one kernel."""
    model, moe, size = share.model, share.model.moe, share.bytes
    width, routed = model.d_model * size, moe.top_k * model.d_model * size * share.parallel.tp  # tp doesn't cut it
    if is_again:
        return over_positions(share, share.positions, width, routed)
    inner = (moe.top_k + moe.num_shared_experts) * model.expert_dim * size
    return over_positions(share, share.positions, 2 * width + 4, 2 * routed + (4 if model.is_gated else 2) * inner)


def attention_bytes(share: RankShare, *, is_fused: bool) -> tuple[int, int]:
    """Bytes per position, before tp cuts them: of the widening product, and of all behind it."""
    model, size = share.model, share.bytes
    kv_heads = max(model.kv_heads, share.parallel.tp)
    turned = (model.num_heads + kv_heads) * model.head_dim
    rest = model.heads_dim * size + 4 * model.num_heads + turned * size * (model.is_rotary or model.qk_norm)
    if model.qk_norm:
        rest += model.heads_dim * size * (model.num_heads > model.kv_heads)
        rest += 4 * (model.num_heads + kv_heads) + turned * unfused_bytes(size, is_fused)
    return (turned + kv_heads * model.head_dim) * size, rest


def feed_forward_bytes(share: RankShare) -> tuple[int, int]:
    """The same of the dense feed-forward layer."""
    model = share.model
    inner = (2 if model.is_gated else 1) * model.ffn_dim * share.bytes
    return inner, 0 if model.feed_forward == "relu" else inner


def norm_bytes(share: RankShare, is_fused: bool) -> int:
    """Statistics of a position's norm, and what one that isn't fused keeps beside."""
    if share.model.traits.norm == "layer":
        return 8 if is_fused else 2 * share.bytes
    return 4 + share.model.d_model * unfused_bytes(share.bytes, is_fused)


def unfused_bytes(size: int, is_fused: bool) -> int:
    """Bytes per number that an RMS norm of several kernels keeps beside its input as it is."""
    return 0 if is_fused else 4 if size == 4 else 8 - size


def over_positions(share: RankShare, num_positions: int, on_stream: float, cut: float) -> float:
    """Bytes of a micro-batch, from those per position of the residual stream and of the layers that tp cuts."""
    positions, tp = share.train.micro_batch_size * num_positions, share.parallel.tp
    return positions * (on_stream / (tp if share.parallel.is_sequence_parallel else 1) + cut / tp)


def stream_bytes(share: RankShare) -> float:
    """Bytes of the residual stream of a micro-batch on this rank."""
    return over_positions(share, share.positions, share.model.d_model * share.bytes, 0)
