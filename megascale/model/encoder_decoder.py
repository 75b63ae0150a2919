"""Layers of a model with two stacks, an encoder that a decoder reads.

The hidden state is one tensor: the encoder's positions first, the decoder's behind them. A layer works on its part and
passes the other one on, so the list of layers can be cut anywhere into stages of a pipeline, and what travels keeps its
shape. With sequence shards each part is dealt out over tp by itself: a rank has S / tp positions of one and T / tp of
the other.

`context` is the decoder's, `context.source` the encoder's.
Shapes: B rows, S positions of the encoder, T of the decoder, U = S + T, D d_model.
"""

import torch
from torch import nn

from megascale.config.model import ModelConfig
from megascale.model.attention import Attention
from megascale.model.attention_core import PLAIN, Scoring
from megascale.model.axes import Axes
from megascale.model.block import Block, PostNormBlock
from megascale.model.context import Context
from megascale.model.cross_attention import CrossAttention
from megascale.model.dropout import Dropout
from megascale.model.embedding import Table
from megascale.model.head import Head
from megascale.model.norm import RMSNorm, build_norm
from megascale.model.pair_context import build_pair_context
from megascale.model.recompute import run_block
from megascale.model.relative_bias import RelativeBias
from megascale.parallel.collectives import reduce_from, reduce_scatter

UNSCALED = Scoring(scale=1.0)
"""T5 has no 1 / sqrt(C): its initial queries are that much smaller (Raffel et al. 2020, published code)."""


def split_parts(hidden_BUD: torch.Tensor, context: Context) -> tuple[torch.Tensor, torch.Tensor]:
    """The encoder's part of the hidden state, and the decoder's."""
    num_source = len(context.source.columns_T)
    return hidden_BUD[:, :num_source], hidden_BUD[:, num_source:]


class PairEmbedding(nn.Module):
    """Token vectors of both parts from one table; of the original transformer also positions as sines.

    Shape: (B, U) int64 over whole rows to (B, U, D).
    Cost: as `Embedding`, one collective a part.
    Source: Vaswani et al. 2017, sections 3.4 and 3.5; Raffel et al. 2020, section 2.1.
    """

    def __init__(self, config: ModelConfig, axes: Axes):
        super().__init__()
        self.axes, self.has_sines = axes, config.traits.positions == "sinusoidal"
        self.tokens = Table(config.padded_vocab_size, config.d_model, axes.tp)
        self.source_dropout = Dropout(config.dropout, site="embedding.source")
        self.dropout = Dropout(config.dropout, site="embedding")

    def forward(self, tokens_BU: torch.Tensor, context: Context) -> torch.Tensor:
        num_source = len(context.source.mask.columns_T)
        source_BSD = self.embed(tokens_BU[:, :num_source], context.source)
        target_BTD = self.embed(tokens_BU[:, num_source:], context)
        parts = self.source_dropout(source_BSD, context.source), self.dropout(target_BTD, context)
        return torch.cat(parts, dim=1)

    def embed(self, tokens_BT: torch.Tensor, context: Context) -> torch.Tensor:
        """One part, before its dropout."""
        part_BTD, tp = self.tokens(tokens_BT), self.axes.tp
        is_sharded = self.axes.is_sequence_parallel
        hidden_BTD = reduce_scatter(part_BTD, tp, 1) if is_sharded else reduce_from(part_BTD, tp)
        if not self.has_sines:
            return hidden_BTD
        width = hidden_BTD.shape[-1]
        sines_BTD = sinusoidal_positions(context.position_ids_BT, width)
        return hidden_BTD * width**0.5 + sines_BTD.to(hidden_BTD.dtype)


def sinusoidal_positions(position_ids_BT: torch.Tensor, d_model: int) -> torch.Tensor:
    """sin(p / 10000^(2i / D)) in feature 2i and the cosine of the same in feature 2i + 1, fp32.

    Shape: (B, T) int64 to (B, T, D).
    Source: Vaswani et al. 2017, section 3.5.
    """
    even_d = torch.arange(0, d_model, 2, device=position_ids_BT.device, dtype=torch.float32)
    angles_BTd = position_ids_BT[..., None].float() * 10000.0 ** (-even_d / d_model)
    return torch.stack((angles_BTd.sin(), angles_BTd.cos()), dim=-1).flatten(-2)[..., :d_model]


class RelativeAttention(Attention):
    """Self-attention as T5 has it: scores without a factor, with the stack's bias by distance."""

    def __init__(self, config: ModelConfig, name: str, axes: Axes, is_causal: bool):
        super().__init__(config, name, axes)
        self.relative_bias = RelativeBias(config, axes, is_causal)

    def scoring_of(self, context: Context, num_keys: int) -> Scoring:
        queries_T = context.mask.columns_T
        keys_S = torch.arange(num_keys, device=queries_T.device)
        return UNSCALED._replace(bias_HTS=self.relative_bias(queries_T, keys_S))


class EncoderBlock(Block):
    """A block on the encoder's part. Shape: (B, U, D) to (B, U, D)."""

    def __init__(self, config: ModelConfig, name: str, axes: Axes):
        super().__init__(config, name, axes)
        if config.traits.positions == "relative":
            self.attention = RelativeAttention(config, name, axes, is_causal=False)

    def forward(self, hidden_BUD: torch.Tensor, context: Context) -> torch.Tensor:
        source_BSD, target_BTD = split_parts(hidden_BUD, context)
        if not source_BSD.shape[1]:  # in generation: it was read before
            return hidden_BUD
        source_BSD = super().forward(source_BSD, context.source)
        return torch.cat((source_BSD, target_BTD), dim=1)


class PostNormEncoderBlock(EncoderBlock, PostNormBlock):
    """The same with the norms after the sums."""


class DecoderBlock(Block):
    """A block on the decoder's part: self-attention, attention to the encoder's part, feed-forward.

    Both attentions make the first half for `recompute.py`.

    Shape: (B, U, D) to (B, U, D).
    """

    def __init__(self, config: ModelConfig, name: str, axes: Axes):
        super().__init__(config, name, axes)
        is_relative = config.traits.positions == "relative"
        if is_relative:
            self.attention = RelativeAttention(config, name, axes, is_causal=True)
        self.cross_norm = build_norm(config)
        self.cross_attention = CrossAttention(config, name, axes, UNSCALED if is_relative else PLAIN)
        self.cross_dropout = Dropout(config.dropout, site=f"{name}.cross_attention")

    def forward(self, hidden_BUD: torch.Tensor, context: Context) -> torch.Tensor:
        source_BSD, target_BTD = split_parts(hidden_BUD, context)

        def attend_twice(target_BTD: torch.Tensor, context: Context) -> torch.Tensor:
            return self.attend_source(self.attend(target_BTD, context), source_BSD, context)

        target_BTD = run_block(self.memory, attend_twice, self.feed, target_BTD, context)
        return torch.cat((source_BSD, target_BTD), dim=1)

    def attend_source(self, hidden_BTD: torch.Tensor, source_BSD: torch.Tensor, context: Context) -> torch.Tensor:
        """Adds what each position reads of the encoder's part."""
        read_BTD = self.cross_attention(self.cross_norm(hidden_BTD), source_BSD, context)
        return hidden_BTD + self.cross_dropout(read_BTD, context)


class PostNormDecoderBlock(DecoderBlock, PostNormBlock):
    """The same with the norms after the sums."""

    def attend_source(self, hidden_BTD: torch.Tensor, source_BSD: torch.Tensor, context: Context) -> torch.Tensor:
        read_BTD = self.cross_attention(hidden_BTD, source_BSD, context)
        return self.cross_norm(hidden_BTD + self.cross_dropout(read_BTD, context))


class StackNorm(RMSNorm):
    """The norm and dropout that close a stack of T5, on the part of that stack. Shape: (B, U, D) to (B, U, D)."""

    def __init__(self, config: ModelConfig, name: str, is_encoder: bool):
        super().__init__(config.d_model, config.norm_eps)
        self.is_encoder, self.dropout = is_encoder, Dropout(config.dropout, site=name)

    def forward(self, hidden_BUD: torch.Tensor, context: Context) -> torch.Tensor:
        source_BSD, target_BTD = split_parts(hidden_BUD, context)
        if self.is_encoder:
            source_BSD = self.dropout(super().forward(source_BSD), context.source)
        else:
            target_BTD = self.dropout(super().forward(target_BTD), context)
        return torch.cat((source_BSD, target_BTD), dim=1)


class PairHead(Head):
    """The head of the decoder's part. A tied head of T5 sees it divided by sqrt(D) (Raffel et al. 2020, code)."""

    def __init__(self, config: ModelConfig, axes: Axes):
        super().__init__(config, axes)
        if config.is_tied and config.traits.positions == "relative":
            self.scale = self.scale * config.d_model**-0.5

    def forward(
        self, hidden_BUD: torch.Tensor, context: Context, last_B: torch.Tensor | None = None
    ) -> torch.Tensor:
        return super().forward(split_parts(hidden_BUD, context)[1], context, last_B)

    def loss(self, hidden_BUD: torch.Tensor, context: Context, labels_BT: torch.Tensor) -> torch.Tensor:
        return super().loss(split_parts(hidden_BUD, context)[1], context, labels_BT)

    def count_hits(
        self, hidden_BUD: torch.Tensor, context: Context, labels_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().count_hits(split_parts(hidden_BUD, context)[1], context, labels_BT)


def encode(
    model: nn.Module, source_BS: torch.Tensor, source_documents_BS: torch.Tensor | None = None
) -> torch.Tensor:
    """The encoder's output, for a model of which this rank has all layers, in eval mode.

    Args:
        model: a `Transformer` of an encoder-decoder.
        source_documents_BS: as for `build_pair_context`; padding has a number other than the text's.

    Shape: (B, S) int64 to (B, S, D); with sequence shards this rank's part of the positions.
    """
    context = pair_context(model, source_BS.shape, 0, source_documents_BS)
    hidden_BUD = model.get_submodule("embedding")(source_BS, context)
    for spec, layer in zip(model.own_specs, model.layers, strict=True):
        if spec.name.startswith("encoder."):
            hidden_BUD = layer(hidden_BUD, context)
    return hidden_BUD


def decode(
    model: nn.Module, tokens_BT: torch.Tensor, source_BSD: torch.Tensor, context: Context,
    last_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits of the decoder over what `encode` gave.

    Args:
        tokens_BT: inputs of the decoder, from its start token on, or with a cache the new ones.
        context: of the decoder, see `pair_context`.
        last_B: see `Head.forward`.

    Shape: (B, T) int64 to (B, T, V), or with `last_B` to (B, V).
    """
    embedding = model.get_submodule("embedding")
    hidden_BUD = torch.cat((source_BSD, embedding.embed(tokens_BT, context)), dim=1)
    for spec, layer in zip(model.own_specs, model.layers, strict=True):
        if spec.name.startswith("decoder."):
            hidden_BUD = layer(hidden_BUD, context)
    return model.get_submodule("head")(hidden_BUD, context, last_B)


def pair_context(
    model: nn.Module, source_shape: tuple[int, int], num_target: int, source_documents_BS: torch.Tensor | None
) -> Context:
    """The context of `encode` and `decode`: one document, document 0 of the source, is continued."""
    documents_BT = None
    if source_documents_BS is not None:
        documents_BT = source_documents_BS.new_zeros(source_shape[0], num_target)
    return build_pair_context(
        model.config, source_shape[1], num_target, model.device, model.axes,
        source_documents_BS=source_documents_BS, documents_BT=documents_BT,
    )
