"""Span corruption: runs of tokens are taken out of a text, and a decoder is to say what they were. Pure.

    text    Thank you for inviting me to your party last week
    source  Thank you <X> me to your party <Y> week <end>
    target  <X> for inviting <Y> last <end>

Sentinels <X>, <Y>, ... are tokens that no text has.
Source: Raffel et al. 2020, section 3.1.4, and `random_spans_noise_mask` of the code published with it, whose targets
end with the end-of-text token where those of the paper's figure end with one more sentinel.
Legend: B rows, S positions of the source, T of the target.
"""

from collections.abc import Sequence

import numpy as np

from megascale.config.schema import RunConfig
from megascale.config.target import MASK_FRACTION, plan_spans, span_plan, target_len
from megascale.data.manifest import Manifest, read_tokenizer
from megascale.data.objectives import IGNORED_LABEL, Arrays
from megascale.data.permutation import derive_key
from megascale.data.row import Row
from megascale.data.tokenizer import parse_tokenizer
from megascale.data.transfer import access_of
from megascale.errors import DataError

SENTINEL = "<extra_id_{}>"
"""Special tokens of this name are the sentinels, as in T5's own tokenizer."""
MIN_TOKENS = 2
"""Of a row that anything can be hidden of."""


class SpanCorruption:
    """Makes sources and targets of rows of text.

    Args:
        seq_len: positions of a source.
        target_len: positions of a target.
        row_tokens: tokens of text whose source and target fit.
        fraction: share of the tokens that are hidden.
        mean_tokens: mean length of a span.
        end_id: ends source and target, begins the decoder's input and pads all of them.
        sentinels: ids in the order of their use.
        separates: whether the documents of a row are kept apart; a span over their border is the first one's.
    """

    overlap = 0

    def __init__(
        self, seq_len: int, target_len: int, row_tokens: int, fraction: float, mean_tokens: float, end_id: int,
        sentinels: Sequence[int], separates: bool,
    ):
        self.seq_len, self.target_len, self.row_tokens = seq_len, target_len, row_tokens
        self.fraction, self.mean_tokens, self.end_id = fraction, mean_tokens, end_id
        self.sentinels, self.separates = np.array(sentinels, np.int64), separates

    def assemble(self, rows: Sequence[Row | None], keys_B: np.ndarray) -> Arrays:
        """Corrupts each row by its key. A row of fewer than two tokens has no labels."""
        arrays = blank_pairs(len(rows), self.seq_len, self.target_len, self.end_id)
        for number, (row, key) in enumerate(zip(rows, keys_B.tolist(), strict=True)):
            if row is not None and len(row.tokens) >= MIN_TOKENS:
                fill_pair(arrays, number, *self.corrupt(row, key), self.end_id)
        return arrays

    def corrupt(self, row: Row, key: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Source and target of a row, and the document of each of their positions."""
        plan = plan_spans(len(row.tokens), self.fraction, self.mean_tokens)
        kept_s = cut_randomly(plan.text - plan.hidden, plan.spans, derive_key(key, 0))
        hidden_s = cut_randomly(plan.hidden, plan.spans, derive_key(key, 1))
        starts_s = np.cumsum(kept_s + hidden_s) - hidden_s
        is_hidden = np.repeat(np.tile([False, True], plan.spans), np.stack([kept_s, hidden_s], axis=1).ravel())
        tokens = row.tokens.astype(np.int64)
        documents = np.repeat(np.arange(len(row.ends)), np.diff(row.ends, prepend=0))
        documents = documents if self.separates else np.zeros_like(documents)
        sentinels_s = self.sentinels[: plan.spans]

        source, is_start = tokens.copy(), np.zeros(plan.text, bool)
        source[starts_s], is_start[starts_s] = sentinels_s, True
        is_source = ~is_hidden | is_start
        firsts = np.cumsum(hidden_s) - hidden_s  # of each span among the hidden tokens; its sentinel goes before it
        target = np.insert(tokens[is_hidden], firsts, sentinels_s)
        target_documents = np.repeat(documents[starts_s], hidden_s + 1)
        source_documents = documents[is_source]
        return (
            np.append(source[is_source], self.end_id), np.append(source_documents, source_documents[-1]),
            np.append(target, self.end_id), np.append(target_documents, target_documents[-1]),
        )


def cut_randomly(total: int, num_parts: int, key: np.ndarray) -> np.ndarray:
    """Lengths of `num_parts` parts of 1 or more that sum to `total`, each such list as likely as any other."""
    draws = derive_key(key, np.arange(total - 1))
    cuts = np.sort(np.argsort(draws, kind="stable")[: num_parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def blank_pairs(num_rows: int, num_source: int, num_target: int, pad_id: int) -> Arrays:
    """Rows of nothing but padding, which all of a row's target may look at."""
    return Arrays(
        tokens_BT=np.full((num_rows, num_target), pad_id, np.int64),
        labels_BT=np.full((num_rows, num_target), IGNORED_LABEL, np.int64),
        documents_BT=np.zeros((num_rows, num_target), np.int32),
        source_BS=np.full((num_rows, num_source), pad_id, np.int64),
        source_documents_BS=np.zeros((num_rows, num_source), np.int32),
    )


def fill_pair(
    arrays: Arrays, number: int, source: np.ndarray, source_documents: np.ndarray, target: np.ndarray,
    target_documents: np.ndarray, start_id: int,
) -> None:
    """Writes a row's source and target, in place.

    The decoder's input is the target one position later, after `start_id`, which also begins each further document.
    Padding of the source is a document of its own. That of the target has no labels, stands behind all that has, and
    belongs to the last document, so that it has a key to look at.
    """
    num_source, num_target = len(source), len(target)
    arrays.source_BS[number, :num_source] = source
    arrays.source_documents_BS[number] = source_documents[-1] + 1
    arrays.source_documents_BS[number, :num_source] = source_documents
    arrays.labels_BT[number, :num_target] = target
    is_first = np.diff(target_documents, prepend=-1) != 0
    arrays.tokens_BT[number, :num_target] = np.where(is_first, start_id, np.concatenate([[start_id], target[:-1]]))
    arrays.documents_BT[number] = target_documents[-1]
    arrays.documents_BT[number, :num_target] = target_documents


def build_spans(config: RunConfig, manifest: Manifest) -> SpanCorruption:
    """The objective of a run over corpora with the tokenizer of `manifest`.

    Raises:
        DataError: too few sentinels.
    """
    objective, plan = config.data.objective, span_plan(config)
    return SpanCorruption(
        config.train.seq_len, target_len(config), plan.text, objective.mask_fraction or MASK_FRACTION,
        objective.mean_span_tokens, manifest.eos_id, find_sentinels(config, manifest, plan.spans),
        config.data.document_mask,
    )


def find_sentinels(config: RunConfig, manifest: Manifest, wanted: int) -> list[int]:
    """The tokenizer's special tokens `<extra_id_0>` and so on, or ids beyond the tokenizer's from the last one down.

    Raises:
        DataError: there are fewer than `wanted`.
    """
    tokenizer = parse_tokenizer(read_tokenizer(manifest, access_of(config.data)), manifest.tokenizer_place)
    named = [tokenizer.token_to_id(SENTINEL.format(number)) for number in range(wanted)]
    if None not in named:
        return named
    vocab_size, used = config.model.vocab_size, manifest.index.vocab_size
    if vocab_size - used < wanted:
        raise DataError(
            f"rows of seq_len {config.train.seq_len} have {wanted} hidden spans, each with a sentinel of its own:"
            f" {manifest.tokenizer_place} has no special tokens {SENTINEL.format(0)} to {SENTINEL.format(wanted - 1)},"
            f" and model.vocab_size = {vocab_size} leaves {max(vocab_size - used, 0)} ids beyond its {used}; use a"
            f" model.vocab_size of {used + wanted} or more, or train a tokenizer with these as --special-token"
        )
    return list(range(vocab_size - 1, vocab_size - 1 - wanted, -1))
