"""Masked language modelling: some tokens of a row are hidden, and the model is to name them. Pure.

A row becomes `[CLS] text [SEP]`, or with pairs of segments `[CLS] first [SEP] second [SEP]`. Of its text 15 % are to be
named: of these 80 % are replaced by [MASK], 10 % by any token of text, 10 % stay. Which, is a function of the row and
its key alone, so it is the same in any layout and after any resumption; a row that is read again, in a later epoch,
has another number and another key. Validation rows have keys of their own, the same in every pass.

Pairs cut the text of a row in two, within its longest piece, so that the one side goes on with the other. Half of them
stay as they are. In the others

- `sop`: the two change places (Lan et al. 2019, arXiv 1909.11942, section 3.1);
- `nsp`: the second is the end of another row, as many tokens of it: row g reads from row g ^ 1, its neighbour by
  number, which any rank can read and no layout changes.

Legend: B rows, T positions, V vocabulary.
Source: Devlin et al. 2019 (arXiv 1810.04805), section 3.1 and appendix A.1; whole words are those of its later code.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from megascale.config.bert_rules import mask_fraction
from megascale.config.objective import ObjectiveConfig
from megascale.config.schema import RunConfig
from megascale.data.manifest import Manifest, read_tokenizer
from megascale.data.objectives import IGNORED_LABEL, PAIR_LABELS, Arrays
from megascale.data.permutation import derive_key
from megascale.data.row import Row
from megascale.data.tokenizer import parse_tokenizer
from megascale.data.transfer import access_of
from megascale.data.words import WordTable, build_word_table
from megascale.errors import DataError

MASKED_FRACTION, CHANGED_FRACTION = 0.8, 0.9
"""Up to the first a hidden token becomes [MASK], from there to the second any token; the rest stays."""
WHICH, HOW, WHAT, PAIR = range(4)
"""Keep apart what is drawn for a row: which tokens are hidden, how, by what, and its pair."""


@dataclass(frozen=True)
class MaskTokens:
    """The ids that masking puts in."""

    mask_id: int
    cls_id: int
    sep_id: int
    pad_id: int


class Segments(NamedTuple):
    """The text of a row, cut in two where it is a pair.

    Attributes:
        parts: one segment or two.
        label: of the pair; None where there is none.
    """

    parts: list[np.ndarray]
    label: int | None = None


class Masked:
    """See the top of the file.

    Args:
        seq_len: positions of a row.
        tokens: the ids put in.
        words: of the tokenizer.
        fraction: share of the text's tokens that are to be named; of a row at least one token.
        has_whole_words: whether the tokens of a word are hidden together.
        pair_task: what the second segment is; none, if there is none.
        keeps_documents: whether each piece of a row is a document of its own; if not, all text of a row is one.
    """

    overlap = 0

    def __init__(
        self, seq_len: int, tokens: MaskTokens, words: WordTable, fraction: float, *, has_whole_words: bool = False,
        pair_task: Literal["none", "nsp", "sop"] = "none", keeps_documents: bool = False,
    ):
        self.seq_len, self.tokens, self.words, self.fraction = seq_len, tokens, words, fraction
        self.row_tokens = seq_len - (2 if pair_task == "none" else 3)
        self.has_whole_words, self.pair_task, self.keeps_documents = has_whole_words, pair_task, keeps_documents
        self.reads_partners = pair_task == "nsp"
        self.text_ids = np.flatnonzero(words.is_text_V)

    def assemble(self, rows: Sequence[Row | None], keys_B: np.ndarray) -> Arrays:
        """Hides tokens of each row; a row that isn't there is padding."""
        shape = len(rows), self.seq_len
        tokens_BT, labels_BT = np.full(shape, self.tokens.pad_id), np.full(shape, IGNORED_LABEL)
        documents_BT = np.zeros(shape, np.int32)
        segments_BT = None if self.pair_task == "none" else np.zeros(shape, np.int64)
        for number, (row, key) in enumerate(zip(rows, keys_B.tolist(), strict=True)):
            if row is None:
                continue
            segments = self.cut(row, key)
            filled = self._fill(tokens_BT[number], labels_BT[number], segments, key)
            if segments.label is not None:
                labels_BT[number, 0] = segments.label
            if segments_BT is not None:
                segments_BT[number, 2 + len(segments.parts[0]) : filled] = 1
            if self.keeps_documents:
                begins = [1 + end for end in row.ends[:-1]]  # [CLS] is of the first piece, [SEP] of the last
                documents_BT[number, begins] = 1
                documents_BT[number] = documents_BT[number].cumsum()
            documents_BT[number, filled:] += 1
        return Arrays(tokens_BT, labels_BT, documents_BT, segments_BT=segments_BT)

    def cut(self, row: Row, key: int) -> Segments:
        """The segments of a row; one alone where the row is too short for two."""
        text = np.asarray(row.tokens, np.int64)
        if self.pair_task == "none" or len(text) < 2:
            return Segments([text])
        where, whether = chances(key, PAIR, 2)
        lengths = np.diff(np.array([0, *row.ends]))
        longest = int(lengths.argmax())
        if lengths[longest] < 2:
            return Segments([text])
        cut = row.ends[longest] - int(lengths[longest]) + 1 + int(where * (lengths[longest] - 1))
        first, second = text[:cut], text[cut:]
        if whether < 0.5 or (self.reads_partners and row.partner is None):
            return Segments([first, second], PAIR_LABELS[0])
        if self.pair_task == "sop":
            return Segments([second, first], PAIR_LABELS[1])
        return Segments([first, np.asarray(row.partner[-len(second) :], np.int64)], PAIR_LABELS[1])

    def _fill(self, tokens_T: np.ndarray, labels_T: np.ndarray, segments: Segments, key: int) -> int:
        """Writes a row's tokens and the labels of those hidden; gives how many positions it takes."""
        tokens = self.tokens
        pieces = [np.array([tokens.cls_id])]
        for part in segments.parts:
            pieces += [part, [tokens.sep_id]]
        line = np.concatenate(pieces)
        places = self.choose(line, sum(map(len, segments.parts)), key)
        how, what = chances(key, HOW, len(places)), chances(key, WHAT, len(places))
        hidden = np.where(how < MASKED_FRACTION, tokens.mask_id, line[places])
        is_changed = (how >= MASKED_FRACTION) & (how < CHANGED_FRACTION)
        hidden[is_changed] = self.text_ids[(what[is_changed] * len(self.text_ids)).astype(np.int64)]
        labels_T[places] = line[places]
        tokens_T[: len(line)] = line
        tokens_T[places] = hidden
        return len(line)

    def choose(self, line: np.ndarray, num_text: int, key: int) -> np.ndarray:
        """The places in a line of tokens that are to be named: tokens of text, or whole words, in a drawn order.

        A word that would be one too many is passed over.
        """
        places = np.flatnonzero(self.words.is_text_V[line])
        wanted = max(1, round(self.fraction * num_text))
        draws = chances(key, WHICH, len(line))
        if not self.has_whole_words:
            return places[np.argsort(draws[places], kind="stable")[:wanted]]
        words = np.split(places, np.flatnonzero(self._breaks(line, places)))
        words = [word for word in words if len(word)]
        chosen: list[np.ndarray] = []
        for word in sorted(words, key=lambda word: draws[word[0]]):
            if len(word) <= wanted:
                chosen.append(word)
                wanted -= len(word)
            if wanted == 0:
                break
        return np.concatenate(chosen) if chosen else places[:0]

    def _breaks(self, line: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Whether a word begins at each of the places; after a token that isn't text one always does."""
        return self.words.word_starts(line)[places] | (np.diff(places, prepend=-1) != 1)


def chances(key: int, what: int, count: int) -> np.ndarray:
    """Numbers in [0, 1) of a row's key."""
    return (derive_key(key, what, np.arange(count)) >> np.uint64(11)) * 2.0**-53


def build_masked(config: RunConfig, manifest: Manifest) -> Masked:
    """Masked language modelling over the corpora of a run, by the ids of their tokenizer.

    Raises:
        DataError: the tokenizer lacks a token that masking puts in.
    """
    objective = config.data.objective
    tokenizer = parse_tokenizer(read_tokenizer(manifest, access_of(config.data)), manifest.tokenizer_place)
    ids = find_mask_tokens(objective, tokenizer.token_to_id, manifest)
    return Masked(
        config.train.seq_len, ids, build_word_table(tokenizer, manifest.vocab_size), mask_fraction(config),
        has_whole_words=objective.whole_word, pair_task=objective.pair_task,
        keeps_documents=config.data.document_mask,
    )


def find_mask_tokens(
    objective: ObjectiveConfig, token_to_id: Callable[[str], int | None], manifest: Manifest
) -> MaskTokens:
    """The ids of the tokens that masking puts in; padding is the end of a text, and has no label."""
    names = {"mask": objective.mask_token, "cls": objective.cls_token, "sep": objective.sep_token}
    ids = {part: token_to_id(token) for part, token in names.items()}
    missing = [part for part, found in ids.items() if found is None or found >= manifest.vocab_size]
    if missing:
        options = " ".join(f"--special-token '{names[part]}'" for part in missing)
        raise DataError(
            f"data.objective.{missing[0]}_token = {names[missing[0]]!r} isn't in {manifest.tokenizer_place}, and masked"
            f" language modelling puts it into each row; build the corpus with {options}, or name a token that is there"
        )
    if len(set(ids.values())) < len(ids):
        raise DataError(
            f"data.objective.mask_token, cls_token and sep_token are {', '.join(map(repr, names.values()))}: three"
            " different tokens are needed, or the model couldn't tell them apart"
        )
    return MaskTokens(ids["mask"], ids["cls"], ids["sep"], manifest.eos_id)
