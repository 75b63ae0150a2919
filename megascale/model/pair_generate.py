"""Continuations of an encoder-decoder: the source is read once, and the decoder's rows grow by a token a step.

Shapes: B rows, S positions of the encoder, T new positions of the decoder, U = S + T, V padded vocabulary.
"""

from collections.abc import Sequence

import torch

from megascale.model.attention_mask import AttentionMask
from megascale.model.context import Context
from megascale.model.generate import LanguageModel, window_of
from megascale.model.kv_cache import KvCache, NoCache, seen_so_far
from megascale.model.pair_context import build_pair_context


class PairRows:
    """Says what may follow rows of the decoder that read these sources; see `megascale.model.generate.Continuation`.

    With a cache the first call runs the encoder, and keeps each block's keys and values of its output; later calls
    run the decoder alone, on the last token of each row. Rows begin alike and grow together; one that came to its end
    grows no more, and what it is given from then on means nothing.

    Args:
        sources: tokens of the encoder for each row, as in training with the end token behind them.
        capacity: tokens that a row of the decoder may come to have.
        pad_id: stands behind shorter sources, unseen.

    Cost: without a cache a pass over the source and the row for each token.
    """

    def __init__(
        self, model: LanguageModel, sources: Sequence[Sequence[int]], capacity: int, pad_id: int, *, use_cache: bool
    ):
        self.model = model
        sources_S = [torch.tensor(source) for source in sources]
        self.source_BS = torch.nn.utils.rnn.pad_sequence(sources_S, batch_first=True, padding_value=pad_id)
        lengths_B1 = torch.tensor([[len(source)] for source in sources])
        # Padding is a document of its own, which no token of a text sees.
        self.documents_BS = (torch.arange(self.source_BS.shape[1]) >= lengths_B1).int().to(model.device)
        self.cache = KvCache(len(sources), capacity) if use_cache else NoCache()
        self.keeps, self.is_read = use_cache, False

    def __call__(self, rows: list[list[int]]) -> torch.Tensor:
        """Logits (B, V) of the token after each row of the decoder, fp32 on the CPU."""
        device, longest = self.model.device, max(map(len, rows))
        if self.keeps and self.is_read:
            tokens_BU = torch.tensor([row[-1:] for row in rows])
            context = self._next_context(longest)
        else:
            tokens_BU = torch.cat((self.source_BS, window_of(rows, longest)[0]), dim=1)
            context = self._first_context(longest)
            self.is_read = True
        last_B = torch.full((len(rows),), len(context.mask.columns_T) - 1, device=device)
        return self.model(tokens_BU.to(device), context, last_B=last_B).float().cpu()

    def reorder(self, sources: list[int]) -> None:
        """Row i goes on from what row `sources[i]` was; rows that swap must read the same source."""
        self.cache.reorder(sources)

    def _first_context(self, num_target: int) -> Context:
        model = self.model
        documents_BT = self.documents_BS.new_zeros(len(self.documents_BS), num_target)
        context = build_pair_context(
            model.config, self.documents_BS.shape[1], num_target, model.device, model.axes,
            source_documents_BS=self.documents_BS, documents_BT=documents_BT,
        )
        self.cache.expect(None, num_target)
        return context._replace(cache=self.cache)

    def _next_context(self, num_target: int) -> Context:
        """Of one more position, with no position of the encoder: its blocks have nothing to do."""
        device, none = self.model.device, torch.zeros(0, dtype=torch.int64, device=self.model.device)
        columns_BT = torch.full((len(self.documents_BS), 1), num_target - 1, device=device)
        columns_T = columns_BT[0]
        self.cache.expect(columns_BT, num_target)
        source = Context(none[None], none, None, None, None, AttentionMask(none, None, None, None, None, False))
        seen_B1TS = (self.documents_BS == 0)[:, None, None]
        return Context(
            columns_BT, columns_T, None, None, None, seen_so_far(columns_BT, num_target, None), source=source,
            cross_mask=AttentionMask(columns_T, None, None, seen_B1TS, None, False), cache=self.cache,
        )
