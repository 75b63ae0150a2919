"""Every layer of a model in closed form, without torch: its parameters by how they are cut, and its operations.

The list has the layers of `megascale/model/families/`, in their order; a test counts both on real models. What the
numbers are and why is derived in docs/flops.md.

Legend: L blocks, D d_model, H heads, K kv heads, C head_dim, F d_ff, V vocabulary rows, T positions of queries, S of
keys.
"""

from dataclasses import dataclass, fields
from typing import Self

from megascale.config.model import ModelConfig
from megascale.config.vision import num_visible_patches

MASKED_TOKENS, MASKED_PATCHES = 0.15, 0.75
"""Share of the tokens that a BERT tells, and of the patches that a MAE hides, as their papers have it."""
NUM_PAIR_CLASSES = 2


@dataclass(frozen=True)
class Form:
    """A layer or a part of one. Forms add up.

    Attributes:
        cut_matrices, cut_vectors: elements of decayed parameters, and of others, that tp shares out.
        whole_matrices, whole_vectors: the same of those that every tp rank has.
        experts: elements of matrices that tp and ep share out.
        idle_experts: those of them that a token doesn't meet.
        operations: of the forward pass on one row; a multiplication and an addition are two.
        pieces: (cut, whole or experts, elements) of each matrix by itself.
    """

    cut_matrices: int = 0
    cut_vectors: int = 0
    whole_matrices: int = 0
    whole_vectors: int = 0
    experts: int = 0
    idle_experts: int = 0
    operations: int = 0
    pieces: tuple[tuple[str, int], ...] = ()

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def parameters(self) -> int:
        return self.cut_matrices + self.cut_vectors + self.whole_matrices + self.whole_vectors + self.experts


@dataclass(frozen=True)
class Lengths:
    """Positions of a row: of text or patches that a token count means, and of a decoder's part."""

    seq_len: int
    target_len: int = 0


@dataclass(frozen=True)
class LayerForm:
    """One layer of the list.

    Attributes:
        name: as in `LayerSpec`.
        is_block: whether it is one of the repeated layers.
    """

    name: str
    form: Form
    is_block: bool = False


def layer_forms(config: ModelConfig, lengths: Lengths, *, has_padding: bool = True) -> list[LayerForm]:
    """All layers, first to last.

    Args:
        has_padding: whether the vocabulary is as padded in memory, or as published.
    """
    rows = config.padded_vocab_size if has_padding else config.vocab_size
    if config.traits.has_decoder:
        return _pair_layers(config, lengths, rows)
    if config.family == "vit":
        return _vit_layers(config, rows)
    num_positions = lengths.seq_len
    first = table(config.d_model, rows)
    if config.traits.positions == "learned":
        first += matrix(config.max_seq_len * config.d_model, is_cut=False)
    head = vocabulary_head(config, rows, num_positions)
    if config.family == "bert":
        first += matrix(config.num_segments * config.d_model, is_cut=False) + norm(config)
        head = _masked_head(config, rows, num_positions)
    blocks = [LayerForm(f"blocks.{index}", block(config, index, num_positions), is_block=True)
              for index in range(config.num_layers)]
    last = [LayerForm("final_norm", norm(config))] if config.traits.order != "post" else []
    return [LayerForm("embedding", first), *blocks, *last, LayerForm("head", head)]


def shared_form(config: ModelConfig) -> Form:
    """What every rank of a pipeline holds beside its layers: the biases by distance of a T5's two stacks."""
    if config.traits.positions != "relative":
        return Form()
    return Form(cut_vectors=2 * config.relative_buckets * config.num_heads)


def matrix(size: int, *, is_cut: bool) -> Form:
    """One decayed parameter, which tp shares out or doesn't."""
    if is_cut:
        return Form(cut_matrices=size, pieces=(("cut", size),))
    return Form(whole_matrices=size, pieces=(("whole", size),))


def linear(d_in: int, d_out: int, num_positions: int, has_bias: bool, cut: str = "out") -> Form:
    """A product of some positions with a matrix that tp cuts by its output features, its input features, or not."""
    weights, bias = matrix(d_in * d_out, is_cut=cut != "none"), d_out * has_bias
    vectors = Form(cut_vectors=bias) if cut == "out" else Form(whole_vectors=bias)
    return weights + vectors + Form(operations=2 * d_in * d_out * num_positions)


def table(d_model: int, rows: int) -> Form:
    """A vector per id of the vocabulary, looked up or tied to one that is."""
    return matrix(rows * d_model, is_cut=True)


def vocabulary_head(config: ModelConfig, rows: int, num_positions: int) -> Form:
    """The product with the vocabulary; a tied one has no weights of its own."""
    own = Form() if config.is_tied else table(config.d_model, rows)
    return own + Form(operations=2 * config.d_model * config.padded_vocab_size * num_positions)


def norm(config: ModelConfig) -> Form:
    """Over the residual stream; its operations don't count."""
    return Form(whole_vectors=config.d_model * (2 if config.traits.norm == "layer" and config.has_bias else 1))


def attention(config: ModelConfig, num_positions: int, num_keys: int) -> Form:
    """Self-attention: D (H + 2 K) C and H C D weights, and 4 H C operations for each query and key.

    Args:
        num_keys: that a query is counted to see, hidden ones behind it included.
    """
    qkv_dim = (config.num_heads + 2 * config.kv_heads) * config.head_dim
    norms = Form(whole_vectors=2 * config.head_dim if config.qk_norm else 0)
    return (
        linear(config.d_model, qkv_dim, num_positions, config.has_bias)
        + linear(config.heads_dim, config.d_model, num_positions, config.has_bias, "in")
        + norms + scores(config, num_positions, num_keys)
    )


def scores(config: ModelConfig, num_positions: int, num_keys: int) -> Form:
    """q k and the mixing of v: 2 C operations each for a head, a query and a key."""
    return Form(operations=4 * config.heads_dim * num_positions * num_keys)


def feed_forward(config: ModelConfig, num_positions: int, d_ff: int) -> Form:
    """2 D F weights, with a gate 3 D F."""
    widened = 2 * d_ff if config.is_gated else d_ff
    return (
        linear(config.d_model, widened, num_positions, config.has_bias)
        + linear(d_ff, config.d_model, num_positions, config.has_bias, "in")
    )


def block(config: ModelConfig, index: int, num_positions: int) -> Form:
    """A block with self-attention alone; a parallel one has one norm.

    Keys that a window hides are not counted, where it is shorter than the row.
    """
    is_global = config.window is None or (config.global_every and (index + 1) % config.global_every == 0)
    num_keys = num_positions if is_global else min(config.window, num_positions)
    norms = norm(config) if config.traits.order == "parallel" else norm(config) + norm(config)
    is_sparse = index in config.sparse_blocks
    inner = _sparse(config, num_positions) if is_sparse else feed_forward(config, num_positions, config.ffn_dim)
    return attention(config, num_positions, num_keys) + inner + norms


def _sparse(config: ModelConfig, num_positions: int) -> Form:
    """A router of E D weights, and E experts of which a token meets some and all the shared ones."""
    moe = config.moe
    weights = (3 if config.is_gated else 2) * config.d_model * config.expert_dim
    experts = Form(
        experts=moe.num_experts * weights, idle_experts=(moe.num_experts - moe.top_k) * weights,
        operations=2 * moe.top_k * weights * num_positions,
        pieces=tuple(("experts", moe.num_experts * count * config.d_model * config.expert_dim)
                     for count in ((2, 1) if config.is_gated else (1, 1))),
    )
    shared_dim = moe.num_shared_experts * config.expert_dim
    shared = feed_forward(config, num_positions, shared_dim) if shared_dim else Form()
    return linear(config.d_model, moe.num_experts, num_positions, False, "none") + experts + shared


def _masked_head(config: ModelConfig, rows: int, num_positions: int) -> Form:
    """BERT's: a transform of all positions, the vocabulary's product of the masked ones, classes of the first."""
    width, has_bias = config.d_model, config.has_bias
    head = linear(width, width, num_positions, has_bias, "none") + norm(config)
    head += vocabulary_head(config, rows, round(MASKED_TOKENS * num_positions)) + Form(cut_vectors=rows * has_bias)
    if config.pair_head:
        head += linear(width, width, 1, has_bias, "none") + linear(width, NUM_PAIR_CLASSES, 1, has_bias, "none")
    return head


def _pair_layers(config: ModelConfig, lengths: Lengths, rows: int) -> list[LayerForm]:
    """An encoder of S positions, a decoder of T that reads it."""
    num_source, num_target = lengths.seq_len, lengths.target_len or lengths.seq_len
    width, inner, has_bias = config.d_model, config.heads_dim, config.has_bias
    cross = (
        linear(width, inner, num_target, has_bias) + linear(width, 2 * inner, num_source, has_bias)
        + linear(inner, width, num_target, has_bias, "in") + scores(config, num_target, num_source) + norm(config)
    )
    has_norms = config.traits.order != "post"
    layers = [LayerForm("embedding", table(width, rows))]
    for stack, count, form in (
        ("encoder", config.num_layers, block(config, 0, num_source)),
        ("decoder", config.decoder_layers, block(config, 0, num_target) + cross),
    ):
        layers += [LayerForm(f"{stack}.blocks.{index}", form, is_block=True) for index in range(count)]
        layers += [LayerForm(f"{stack}.final_norm", norm(config))] * has_norms
    return [*layers, LayerForm("head", vocabulary_head(config, rows, num_target))]


def _vit_layers(config: ModelConfig, rows: int) -> list[LayerForm]:
    """Patches and a class token; with MAE the blocks see the visible patches, and the head is the decoder of all."""
    vision, width = config.vision, config.d_model
    patches, num_cls = vision.num_patches, int(vision.has_cls)
    seen = num_visible_patches(patches, MASKED_PATCHES) if vision.is_mae else patches
    first = linear(vision.patch_numbers, width, patches, True, "none") + Form(whole_vectors=width * num_cls)
    if vision.is_mae:
        head = _mae_head(config, seen + num_cls)
    else:
        first += matrix(vision.num_positions * width, is_cut=False)
        head = vocabulary_head(config, rows, 1) + Form(cut_vectors=rows)
    blocks = [LayerForm(f"blocks.{index}", block(config, index, seen + num_cls), is_block=True)
              for index in range(config.num_layers)]
    return [LayerForm("embedding", first), *blocks, LayerForm("final_norm", norm(config)), LayerForm("head", head)]


def _mae_head(config: ModelConfig, num_seen: int) -> Form:
    vision, width = config.vision, config.vision.mae_decoder_width
    own = config.model_copy(update={
        "d_model": width, "num_heads": vision.mae_decoder_heads, "num_layers": vision.mae_decoder_layers,
        "d_ff": 4 * width, "head_width": None, "num_kv_heads": None,
    })
    head = linear(config.d_model, width, num_seen, True, "none") + Form(whole_vectors=width) + norm(own)
    for index in range(own.num_layers):
        head += block(own, index, vision.num_positions)
    return head + linear(width, vision.patch_numbers, vision.num_positions, True, "none")
