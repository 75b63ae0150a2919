"""The shape of a transformer, and nothing about the machine or the layout that trains it."""

from math import isqrt
from typing import Annotated, Self

from pydantic import Field, model_validator

from megascale.config.base import Section
from megascale.config.families import GATED, TRAITS, Activation, Family, Traits
from megascale.config.moe import MoeConfig
from megascale.config.rope import RopeScalingConfig
from megascale.config.vision import VisionConfig

Count = Annotated[int, Field(gt=0)]
_ROTARY = ("llama", "palm", "moe")
OWN_FIELDS = {
    "rope_theta": _ROTARY, "rope_scaling": _ROTARY, "qk_norm": _ROTARY, "attention_softcap": _ROTARY,
    "logit_softcap": _ROTARY, "window": ("gpt2", *_ROTARY), "global_every": _ROTARY,
    "num_decoder_layers": ("t5", "transformer"), "relative_buckets": ("t5",), "relative_max_distance": ("t5",),
    "num_segments": ("bert",), "pair_head": ("bert",), "mup_base_width": ("gpt2", "llama"), "moe": ("moe",),
    "vision": ("vit",),
}
"""Fields that only some families can honour; others refuse them rather than ignore them."""
NEEDED = {"moe": "moe", "vision": "vit"}
"""Sections that a family can't do without."""


class ModelConfig(Section):
    """One transformer. A field left empty takes the family's default; the properties give the resolved values."""

    family: Family
    """Kind of transformer. `gpt2`: LayerNorm, learned positions, GELU (Radford et al. 2019). `llama`: RMSNorm, rotary
    positions, SwiGLU, grouped-query attention (Touvron et al. 2023). `palm`: attention and feed-forward side by side
    (Chowdhery et al. 2022). `moe`: a llama whose feed-forward layers are experts. `bert`: an encoder (Devlin et al.
    2019). `t5`: encoder and decoder (Raffel et al. 2020). `transformer`: the original one (Vaswani et al. 2017).
    `vit`: images (Dosovitskiy et al. 2020). No default: it decides what the rest means."""
    num_layers: Count
    """Number of transformer blocks; of the encoder, where there is a decoder too."""
    num_decoder_layers: Count | None = None
    """Blocks of the decoder (t5 and transformer). Empty: as many as the encoder has."""
    d_model: Count
    """Width of the residual stream, in features."""
    num_heads: Count
    """Query heads per block."""
    head_width: Count | None = None
    """Features of a head. Empty: d_model / num_heads."""
    num_kv_heads: Count | None = None
    """Key and value heads per block, each shared by num_heads / num_kv_heads query heads (Ainslie et al. 2023, GQA).
    Empty: one per query head."""
    d_ff: Count | None = None
    """Width of the feed-forward layer, in features. Empty: 4 d_model; with a gated activation 8/3 d_model rounded up to
    a multiple of 64, so that its three matrices weigh as much as two (Shazeer 2020, section 2)."""
    vocab_size: Count
    """Number of token ids that the data may hold; of a vit's classes."""
    vocab_multiple: Count = 64
    """The embedding table is padded to a multiple of this many rows. 64 keeps matrix products aligned on GPUs and lets
    tp up to 64 divide the table. It never depends on the layout, so neither does a checkpoint."""
    max_seq_len: Count
    """Longest sequence the model accepts, in tokens; with learned positions also the size of their table."""
    activation: Activation | None = None
    """Of the feed-forward layer; `swiglu` and `geglu` multiply two products (Shazeer 2020). Empty: gelu_tanh for gpt2,
    swiglu for llama, palm and moe, gelu for bert and vit, relu for t5 and transformer."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    """Added to the variance in every norm. 1e-5 as in GPT-2 and LLaMA 2 and 3."""
    rope_theta: Annotated[float, Field(gt=1)] | None = None
    """Base of the rotary wavelengths (llama, palm, moe). Empty: 10000 (Su et al. 2021); long contexts want more, LLaMA
    3 takes 500000."""
    rope_scaling: RopeScalingConfig | None = None
    """How rotary positions are stretched to longer contexts. Empty: not at all."""
    qk_norm: bool = False
    """Whether queries and keys are normalised in each head, which keeps scores in bounds (Dehghani et al. 2023, arXiv
    2302.05442)."""
    attention_softcap: Annotated[float, Field(gt=0)] | None = None
    """Scores are bent to stay within this, cap tanh(score / cap), as in Gemma 2 (arXiv 2408.00118). Empty: not bent."""
    logit_softcap: Annotated[float, Field(gt=0)] | None = None
    """The same for the head's logits. Empty: not bent."""
    window: Count | None = None
    """Tokens that a query sees, itself and those before it (sliding window: Beltagy et al. 2020, arXiv 2004.05150).
    Empty, the default: all before it."""
    global_every: Annotated[int, Field(ge=2)] | None = None
    """With a window: every so many-th block sees all tokens all the same; 2 in Gemma 2, 6 in Gemma 3. Empty: none."""
    relative_buckets: Annotated[int, Field(ge=4)] = 32
    """t5: distances that are told apart in the bias on scores (Raffel et al. 2020, section 2.1)."""
    relative_max_distance: Annotated[int, Field(ge=2)] = 128
    """t5: distances from here on share one bucket, in tokens."""
    num_segments: Count = 2
    """bert: kinds of segments that have an embedding of their own."""
    pair_head: bool = False
    """bert: whether the head also tells if two segments belong together, which data.objective.pair_task trains."""
    moe: MoeConfig | None = None
    """Experts of family moe."""
    vision: VisionConfig | None = None
    """Images of family vit."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability that a feature of the embeddings or of a block's residual updates is dropped in training. 0:
    pretraining sees each token about once, and has little to overfit."""
    tie_embeddings: bool | None = None
    """Whether the head reuses the token embedding. Empty: false for llama, moe and vit, true for the others."""
    bias: bool | None = None
    """Whether linear layers and LayerNorm have biases. Empty: true for gpt2, bert, transformer and vit."""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of the initial weights, where the family's paper has no other rule (docs/optimizers.md). 0.02
    as in GPT (Radford et al. 2018, section 4.1)."""
    init_scale: Annotated[float, Field(gt=0)] | None = None
    """With it, weight matrices begin truncated normal with variance init_scale / number of inputs, in place of the
    family's rule; 0.1 in Switch (Fedus et al. 2021, section 2.4). Empty, the default: the family's rule."""
    mup_base_width: Count | None = None
    """gpt2, llama: d_model of the model whose learning rate and init_std these are; this one's are derived from them
    by width, so that what is best for a narrow model is best for a wide one (muP, Yang et al. 2022, arXiv 2203.03466,
    table 8). Empty, the default: no transfer."""

    @property
    def traits(self) -> Traits:
        """What the family is."""
        return TRAITS[self.family]

    @property
    def head_dim(self) -> int:
        """`head_width`, resolved."""
        return self.head_width or self.d_model // self.num_heads

    @property
    def heads_dim(self) -> int:
        """Features of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def decoder_layers(self) -> int:
        """`num_decoder_layers`, resolved; 0 without a decoder."""
        return (self.num_decoder_layers or self.num_layers) if self.traits.has_decoder else 0

    @property
    def num_blocks(self) -> int:
        """Blocks of all stacks."""
        return self.num_layers + self.decoder_layers

    @property
    def feed_forward(self) -> Activation:
        """`activation`, resolved."""
        return self.activation or self.traits.activation

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward layer multiplies two products."""
        return self.feed_forward in GATED

    @property
    def kv_heads(self) -> int:
        """`num_kv_heads`, resolved."""
        return self.num_kv_heads or self.num_heads

    @property
    def ffn_dim(self) -> int:
        """`d_ff`, resolved."""
        if self.d_ff is not None:
            return self.d_ff
        return round_up(-(-8 * self.d_model // 3), 64) if self.is_gated else 4 * self.d_model

    @property
    def expert_dim(self) -> int:
        """Features of an expert, for family moe."""
        return self.moe.d_expert or self.ffn_dim

    @property
    def sparse_blocks(self) -> list[int]:
        """Numbers of the blocks that have experts."""
        if self.moe is None:
            return []
        first = self.moe.num_dense_layers + self.moe.every - 1
        return list(range(first, self.num_layers, self.moe.every))

    @property
    def is_rotary(self) -> bool:
        """Whether positions turn queries and keys, rather than add to the embedding."""
        return self.traits.positions == "rotary"

    @property
    def rotary_base(self) -> float:
        """`rope_theta`, resolved."""
        return self.rope_theta or 10000.0

    @property
    def is_tied(self) -> bool:
        """`tie_embeddings`, resolved."""
        return self.traits.is_tied if self.tie_embeddings is None else self.tie_embeddings

    @property
    def has_bias(self) -> bool:
        """`bias`, resolved."""
        return self.traits.has_bias if self.bias is None else self.bias

    @property
    def width_ratio(self) -> float:
        """How many times wider than muP's base model; 1 without muP."""
        return self.d_model / (self.mup_base_width or self.d_model)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table and of the head; rows from `vocab_size` on stay zero."""
        return round_up(self.vocab_size, self.vocab_multiple)

    @model_validator(mode="after")
    def check_heads(self) -> Self:
        """Refuses heads that don't share the width, or the key-value heads, evenly."""
        if self.head_width is None and self.d_model % self.num_heads:
            raise ValueError(
                f"model.num_heads = {self.num_heads} does not divide model.d_model = {self.d_model}; "
                f"use one of {divisors(self.d_model)}"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"model.num_kv_heads = {self.num_kv_heads} does not divide model.num_heads = {self.num_heads}; "
                f"use one of {divisors(self.num_heads)}"
            )
        return self

    @model_validator(mode="after")
    def check_family(self) -> Self:
        """Refuses settings that the family can't honour, rather than ignore them."""
        if self.is_rotary and self.head_dim % 2:
            legal = [heads for heads in divisors_of(self.d_model) if self.d_model // heads % 2 == 0]
            remedy = f"use one of {', '.join(map(str, legal))}" if legal else "make model.d_model even"
            raise ValueError(
                f"model.num_heads = {self.num_heads} gives heads of {self.head_dim} features, and rotary positions "
                f"need an even number; {remedy}"
            )
        if not self.is_rotary and self.kv_heads != self.num_heads:
            raise ValueError(
                f"model.num_kv_heads = {self.num_kv_heads} needs model.family = llama, palm or moe; for {self.family}"
                f" leave it out or use {self.num_heads}"
            )
        for key, families in OWN_FIELDS.items():
            if self.family not in families and getattr(self, key) != type(self).model_fields[key].default:
                value = getattr(self, key)
                shown = "" if isinstance(value, Section) else f" = {value}"
                raise ValueError(
                    f"model.{key}{shown} needs model.family = {' or '.join(families)}; for"
                    f" {self.family} leave it out"
                )
        for key, family in NEEDED.items():
            if self.family == family and getattr(self, key) is None:
                raise ValueError(f"model.family = {family} needs the section model.{key}; see docs/models.md")
        if self.global_every and self.window is None:
            raise ValueError(f"model.global_every = {self.global_every} needs model.window, from which it is excepted")
        return self


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not under `value`."""
    return -(-value // multiple) * multiple


def divisors_of(value: int) -> list[int]:
    """All divisors, in rising order."""
    small = [divisor for divisor in range(1, isqrt(value) + 1) if value % divisor == 0]
    return sorted({*small, *(value // divisor for divisor in small)})


def divisors(value: int) -> str:
    """All divisors as a message lists them."""
    return ", ".join(map(str, divisors_of(value)))
