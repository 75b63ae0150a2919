"""Beam search: the likeliest continuations of a prompt, found by keeping several open at a time.

Shapes: N open beams, V padded vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megascale.errors import ConfigError
from megascale.model.generate import Continuation


@dataclass(frozen=True)
class BeamSettings:
    """How wide to search, and what counts as best.

    Attributes:
        num_beams: continuations that are kept open.
        num_best: of those that are given back.
        length_penalty: the sum of log-probabilities is divided by (number of tokens) ** this; above 0 longer
            continuations gain. 1 is the mean per token.

    Raises:
        ConfigError: a value that means nothing.
    """

    num_beams: int = 4
    num_best: int = 1
    length_penalty: float = 1.0

    def __post_init__(self):
        if self.num_beams < 1:
            raise ConfigError(f"num_beams = {self.num_beams} keeps no continuation; use at least 1")
        if not 1 <= self.num_best <= self.num_beams:
            raise ConfigError(f"num_best = {self.num_best} is not 1 to num_beams = {self.num_beams}")
        if not math.isfinite(self.length_penalty):
            raise ConfigError(f"length_penalty = {self.length_penalty} is no finite number; 1 is the mean per token")


class Found(NamedTuple):
    """A continuation.

    Attributes:
        tokens: without the prompt; with the end-of-text token where it came to one.
        score: by which continuations are ranked, see `BeamSettings.length_penalty`.
    """

    tokens: list[int]
    score: float


@torch.no_grad()
def beam_search(
    follow: Continuation, prompt: Sequence[int], max_new_tokens: int, eos_token: int | None, settings: BeamSettings
) -> list[Found]:
    """The `num_best` best continuations of a prompt that the search finds, best first.

    Each step keeps the `num_beams` likeliest of all open continuations grown by one token; those that end are set
    aside, if they are among the `num_beams` likeliest. The search ends when no open one, by its score now, beats the
    worst of `num_beams` ended ones. Ties go to the lower beam, then the lower token id. As transformers does it with
    `num_beams` and `early_stopping=False`.

    Args:
        follow: is called with `num_beams` rows.

    Cost: `max_new_tokens` calls of `follow` at most.
    Source: Sutskever et al. 2014, section 3.2; Wu et al. 2016 (arXiv 1609.08144), section 7.
    """
    num_beams, power = settings.num_beams, settings.length_penalty
    beams: list[list[int]] = [[] for _ in range(num_beams)]
    sums_N = torch.full((num_beams,), -math.inf)
    sums_N[0] = 0.0  # all are the same at first: one of them stands for all
    ended: list[Found] = []
    for length in range(1, max_new_tokens + 1):
        logits_NV = follow([[*prompt, *beam] for beam in beams])
        scores_NV = sums_N[:, None] + logits_NV.log_softmax(dim=-1)
        # Twice as many as beams: should each beam end, so many are left to go on.
        best, indices = scores_NV.flatten().sort(descending=True, stable=True)
        best, indices = best[: 2 * num_beams].tolist(), indices[: 2 * num_beams].tolist()
        candidates = [(total, *divmod(index, scores_NV.shape[1])) for total, index in zip(best, indices, strict=True)]
        ended += [
            Found([*beams[beam], token], total / length**power)
            for total, beam, token in candidates[:num_beams] if token == eos_token and total > -math.inf
        ]
        ended = sorted(ended, key=lambda found: -found.score)[:num_beams]
        going_on = [candidate for candidate in candidates if candidate[2] != eos_token][:num_beams]
        beams = [[*beams[beam], token] for _, beam, token in going_on]
        sums_N = torch.tensor([total for total, _, _ in going_on])
        if len(ended) == num_beams and sums_N[0] / length**power <= ended[-1].score:
            break
        follow.reorder([beam for _, beam, _ in going_on])
    else:
        open_ones = (
            Found(beam, total / max_new_tokens**power) for beam, total in zip(beams, sums_N.tolist(), strict=True)
        )
        ended = sorted([*ended, *open_ones], key=lambda found: -found.score)
    return ended[: settings.num_best]
