"""Sampling: continues prompts token by token.

Shapes: B rows, T positions, V padded vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from megascale.config.model import ModelConfig
from megascale.errors import ConfigError, DataError
from megascale.model.axes import Axes
from megascale.model.context import Context
from megascale.model.kv_cache import KvCache, NoCache, first_context, next_context
from megascale.model.seeds import derive_seed


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token (greedy), 1 the model's own distribution.
        top_k: keep the k likeliest tokens only.
        top_p: keep the fewest likeliest tokens that hold this share of the probability (Holtzman et al. 2020).
        seed: decides every draw; row i draws from its own stream, whatever the other rows are.

    Raises:
        ConfigError: a value leaves nothing to draw from.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(
                f"temperature = {self.temperature} is no finite number from 0 up; use 0 for the likeliest token"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k = {self.top_k} keeps no token; use at least 1, or leave it out")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p = {self.top_p} is not a share of the probability; use more than 0, at most 1")


class LanguageModel(Protocol):
    """What generation asks of a decoder, whether one process has it whole or several ranks share it."""

    config: ModelConfig
    device: torch.device
    axes: Axes

    def __call__(
        self, tokens_BT: torch.Tensor, context: Context, *, last_B: torch.Tensor
    ) -> torch.Tensor:
        """Logits (B, V) of the token after position `last_B` of each row."""


class Continuation(Protocol):
    """Says what may follow some rows, which grow by one token from call to call."""

    def __call__(self, rows: list[list[int]]) -> torch.Tensor:
        """Logits (B, V) of the token after each row, fp32 on the CPU."""

    def reorder(self, sources: list[int]) -> None:
        """Row i of the next call goes on from what row `sources[i]` was."""


class Recomputed:
    """Runs the last `max_seq_len` tokens of each row through a decoder for each new one.

    Cost: a forward pass over the whole window for each token.
    """

    def __init__(self, model: LanguageModel):
        self.model = model

    def __call__(self, rows: list[list[int]]) -> torch.Tensor:
        """See `Continuation`."""
        model, device = self.model, self.model.device
        tokens_BT, last_B = window_of(rows, model.config.max_seq_len)
        context = first_context(model.config, tokens_BT.shape[1], device, model.axes, NoCache())
        return model(tokens_BT.to(device), context, last_B=last_B.to(device)).float().cpu()

    def reorder(self, sources: list[int]) -> None:
        """Nothing is kept from call to call."""


class Cached(Recomputed):
    """Runs each token through a decoder once, and keeps its keys and values.

    A row that outgrows `max_seq_len` slides its window: every token gets a new position, so that nothing kept is of
    use, and all is computed anew for each token, as without a cache.

    Args:
        capacity: tokens that a row may come to have.

    Cost: a forward pass over the prompts, then over one position of each row for each token.
    """

    def __init__(self, model: LanguageModel, num_rows: int, capacity: int):
        super().__init__(model)
        self.cache = KvCache(num_rows, min(capacity, model.config.max_seq_len))
        self.is_begun = False

    def __call__(self, rows: list[list[int]]) -> torch.Tensor:
        """See `Continuation`; a row that didn't grow gets the logits that it had."""
        model, longest = self.model, max(map(len, rows))
        if longest > model.config.max_seq_len:
            return super().__call__(rows)
        if not self.is_begun:
            tokens_BT, last_B = window_of(rows, longest)
            context = first_context(model.config, longest, model.device, model.axes, self.cache)
            self.is_begun = True
        else:
            tokens_BT = torch.tensor([row[-1:] for row in rows])
            columns_BT = torch.tensor([[len(row) - 1] for row in rows], device=model.device)
            context = next_context(model.config, columns_BT, longest, self.cache)
            last_B = torch.zeros(len(rows), dtype=torch.int64)
        return model(tokens_BT.to(model.device), context, last_B=last_B.to(model.device)).float().cpu()

    def reorder(self, sources: list[int]) -> None:
        """See `KvCache.reorder`."""
        self.cache.reorder(sources)


def open_rows(model: LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, use_cache: bool
              ) -> Continuation:
    """What continues some prompts of a decoder."""
    if not use_cache:
        return Recomputed(model)
    return Cached(model, len(prompts), max(map(len, prompts)) + max_new_tokens)


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    eos_token: int | None = None,
    *,
    use_cache: bool = True,
) -> Iterator[list[int | None]]:
    """Yields, step by step, the next token of each prompt, and None for rows that are done.

    A row is done once it has drawn `eos_token`, which is the last token that it yields. Prompts may differ in length.
    The model sees at most the last `max_seq_len` tokens of a row. It must be in eval mode for dropout to be off. Ranks
    that share it all call this, and draw the same tokens from the same logits.

    Args:
        use_cache: whether keys and values are kept; the tokens are the same.

    Raises:
        DataError: a prompt is empty, or has a token outside the vocabulary.

    Cost: see `Cached` and `Recomputed`.
    """
    check_prompts(prompts, model.config.vocab_size)
    follow = open_rows(model, prompts, max_new_tokens, use_cache=use_cache)
    yield from draw_rows(follow, prompts, max_new_tokens, sampling or Sampling(), eos_token)


@torch.no_grad()
def draw_rows(
    follow: Continuation, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling,
    eos_token: int | None,
) -> Iterator[list[int | None]]:
    """The same from whatever says what may follow."""
    rows = [list(prompt) for prompt in prompts]
    generators = [torch.Generator().manual_seed(derive_seed(sampling.seed, row)) for row in range(len(rows))]
    is_done = [False] * len(rows)
    for _ in range(max_new_tokens):
        drawn = [
            None if done else draw_token(logits_V, sampling, generator)
            for done, logits_V, generator in zip(is_done, follow(rows), generators, strict=True)
        ]
        for index, token in enumerate(drawn):
            if token is not None:
                rows[index].append(token)
                is_done[index] = token == eos_token
        yield drawn
        if all(is_done):
            return


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Refuses prompts that the model can't read.

    Raises:
        DataError: a prompt is empty, or has a token outside the vocabulary.
    """
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"prompt {index} is empty; give at least one token")
        worst = max(prompt, key=lambda token: abs(token - vocab_size / 2))
        if not 0 <= worst < vocab_size:
            raise DataError(
                f"prompt {index} holds token {worst}, outside of model.vocab_size = {vocab_size}; "
                "use the tokenizer that the model was trained with"
            )


def window_of(rows: list[list[int]], max_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The last tokens of each row as one tensor, and where each row ends in it.

    Shorter rows are padded on the right, where causal attention can't see it.
    """
    windows = [torch.tensor(row[-max_positions:]) for row in rows]
    last_B = torch.tensor([len(window) - 1 for window in windows])
    return torch.nn.utils.rnn.pad_sequence(windows, batch_first=True), last_B


def draw_token(logits_V: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draws one token id from fp32 logits."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    probs_V, ids_V = (logits_V / sampling.temperature).softmax(dim=-1).sort(descending=True, stable=True)
    if sampling.top_k is not None:
        probs_V[sampling.top_k :] = 0
    if sampling.top_p is not None:
        # A token stays if those before it don't yet hold the share; the likeliest always stays.
        share_before_V = probs_V.cumsum(dim=-1) - probs_V
        probs_V[1:][share_before_V[1:] >= sampling.top_p * probs_V.sum()] = 0
    return int(ids_V[torch.multinomial(probs_V, 1, generator=generator)])
