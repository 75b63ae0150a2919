"""How long the decoder's rows are in a run of an encoder-decoder, and how much text a row of span corruption takes.

A text of n tokens has m = n x mask_fraction hidden ones in s = m / mean_span_tokens spans. Its source is n - m + s + 1
tokens, a sentinel for each span and an end, its target m + s + 1.
"""

from functools import cache
from typing import NamedTuple

from megascale.config.schema import RunConfig

MASK_FRACTION = 0.15
"""Raffel et al. 2020, section 3.3.4."""
TARGET_MULTIPLE = 8
"""What the target of full rows is rounded up to: tp up to 8 deals it out evenly, and no layout changes the rows."""


class SpanPlan(NamedTuple):
    """How a text of some length is corrupted.

    Attributes:
        text: its tokens.
        hidden: tokens of it that are hidden.
        spans: runs that these lie in.
    """

    text: int
    hidden: int
    spans: int

    @property
    def source(self) -> int:
        """Positions of the source."""
        return self.text - self.hidden + self.spans + 1

    @property
    def target(self) -> int:
        """Positions of the target."""
        return self.hidden + self.spans + 1


def plan_spans(text: int, fraction: float, mean_tokens: float) -> SpanPlan:
    """The plan for a text of two tokens or more: something is hidden, and something is left before each span."""
    hidden = min(max(round(text * fraction), 1), text - 1)
    return SpanPlan(text, hidden, min(max(round(hidden / mean_tokens), 1), text - hidden, hidden))


@cache
def fill_spans(seq_len: int, fraction: float, mean_tokens: float) -> SpanPlan:
    """The plan for the longest text whose source has `seq_len` positions or fewer.

    Source: `random_spans_helper` of the code published with Raffel et al. 2020.
    """
    text = 2
    while plan_spans(text + 1, fraction, mean_tokens).source <= seq_len:
        text += 1
    return plan_spans(text, fraction, mean_tokens)


def span_plan(config: RunConfig) -> SpanPlan:
    """The plan of a run's full rows."""
    objective = config.data.objective
    fraction = objective.mask_fraction or MASK_FRACTION
    return fill_spans(config.train.seq_len, fraction, objective.mean_span_tokens)


def target_len(config: RunConfig) -> int:
    """Positions of the decoder's rows, 0 without a decoder.

    Empty in the config: for pairs as many as the encoder has; for spans what full rows need, rounded up to a
    multiple of `TARGET_MULTIPLE`.
    """
    if not config.model.traits.has_decoder:
        return 0
    if config.data.objective.target_len is not None:
        return config.data.objective.target_len
    if config.objective_kind != "span":
        return config.train.seq_len
    return -(-span_plan(config).target // TARGET_MULTIPLE) * TARGET_MULTIPLE
