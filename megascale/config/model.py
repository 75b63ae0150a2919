"""The shape of a transformer, and nothing about the machine or the layout that trains it."""

from math import isqrt
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megascale.config.base import Section

Count = Annotated[int, Field(gt=0)]


class ModelConfig(Section):
    """One transformer. A field left empty takes the family's default; the properties give the resolved values."""

    family: Literal["gpt2", "llama"]
    """Kind of transformer. `gpt2`: LayerNorm, learned positions, GELU (Radford et al. 2019). `llama`: RMSNorm, rotary
    positions, SwiGLU, grouped-query attention (Touvron et al. 2023). No default: it decides what the rest means."""
    num_layers: Count
    """Number of transformer blocks."""
    d_model: Count
    """Width of the residual stream, in features."""
    num_heads: Count
    """Query heads per block; each is d_model / num_heads features wide."""
    num_kv_heads: Count | None = None
    """Key and value heads per block, each shared by num_heads / num_kv_heads query heads (Ainslie et al. 2023, GQA).
    Empty: one per query head."""
    d_ff: Count | None = None
    """Width of the feed-forward layer, in features. Empty: 4 d_model for gpt2; for llama 8/3 d_model rounded up to a
    multiple of 64, so that the three SwiGLU matrices weigh as much as the two of GELU (Shazeer 2020, section 2)."""
    vocab_size: Count
    """Number of token ids that the data may hold."""
    vocab_multiple: Count = 64
    """The embedding table is padded to a multiple of this many rows. 64 keeps matrix products aligned on GPUs and lets
    tp up to 64 divide the table. It never depends on the layout, so neither does a checkpoint."""
    max_seq_len: Count
    """Longest sequence the model accepts, in tokens; for gpt2 also the size of the position table."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    """Added to the variance in every norm. 1e-5 as in GPT-2 and LLaMA 2 and 3."""
    rope_theta: Annotated[float, Field(gt=1)] | None = None
    """Base of the rotary wavelengths (llama only). Empty: 10000 (Su et al. 2021); long contexts want more, LLaMA 3
    takes 500000."""
    window: Count | None = None
    """Tokens that a query sees, itself and those before it (sliding window: Beltagy et al. 2020, arXiv 2004.05150).
    Empty, the default: all before it."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability that a feature of the embeddings or of a block's two residual updates is dropped in training. 0:
    pretraining sees each token about once, and has little to overfit."""
    tie_embeddings: bool | None = None
    """Whether the head reuses the token embedding. Empty: true for gpt2, false for llama."""
    bias: bool | None = None
    """Whether linear layers and LayerNorm have biases. Empty: true for gpt2, false for llama."""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of the initial weights. 0.02 as in GPT (Radford et al. 2018, section 4.1)."""

    @property
    def head_dim(self) -> int:
        """Features per attention head."""
        return self.d_model // self.num_heads

    @property
    def kv_heads(self) -> int:
        """`num_kv_heads`, resolved."""
        return self.num_kv_heads or self.num_heads

    @property
    def ffn_dim(self) -> int:
        """`d_ff`, resolved."""
        if self.d_ff is not None:
            return self.d_ff
        return 4 * self.d_model if self.family == "gpt2" else round_up(-(-8 * self.d_model // 3), 64)

    @property
    def is_rotary(self) -> bool:
        """Whether positions turn queries and keys, rather than add to the embedding."""
        return self.family != "gpt2"

    @property
    def rotary_base(self) -> float:
        """`rope_theta`, resolved."""
        return self.rope_theta or 10000.0

    @property
    def is_tied(self) -> bool:
        """`tie_embeddings`, resolved."""
        return self.family == "gpt2" if self.tie_embeddings is None else self.tie_embeddings

    @property
    def has_bias(self) -> bool:
        """`bias`, resolved."""
        return self.family == "gpt2" if self.bias is None else self.bias

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table and of the head; rows from `vocab_size` on stay zero."""
        return round_up(self.vocab_size, self.vocab_multiple)

    @model_validator(mode="after")
    def check_heads(self) -> Self:
        """Refuses heads that don't share the width, or the key-value heads, evenly."""
        if self.d_model % self.num_heads:
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
        if self.family == "gpt2" and self.kv_heads != self.num_heads:
            raise ValueError(
                f"model.num_kv_heads = {self.num_kv_heads} needs model.family = llama; for gpt2 leave it out or use "
                f"{self.num_heads}"
            )
        if self.family == "gpt2" and self.rope_theta is not None:
            raise ValueError(f"model.rope_theta = {self.rope_theta} needs model.family = llama; for gpt2 leave it out")
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
