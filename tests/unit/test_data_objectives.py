"""From rows to inputs and labels: next-token prediction, and the hook for models of other kinds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.config.data import DataConfig
from megascale.data.manifest import load_manifest
from megascale.data.objectives import IGNORED_LABEL, Causal, RowObjective
from megascale.data.packing import Packing
from megascale.data.row import Row
from megascale.data.row_counts import rows_of_shards
from megascale.data.rows import Corpus
from megascale.data.store import open_store
from megascale.data.transfer import Access
from tests.support.corpus import make_corpus
from tests.support.objectives import Masked, SpanCorruption

PAD, MASK, SENTINEL = 0, 500, 600
KEYS = np.arange(100, dtype=np.uint64)


def make_row(lengths):
    tokens = np.arange(1, sum(lengths) + 1, dtype=np.uint16)
    return Row(tokens, np.cumsum(lengths).tolist(), len(tokens))


def expected_position(row, position, label_document_starts):
    """(token, label, document) of a position, from the definition."""
    if row is None or position + 1 >= len(row.tokens):
        return PAD, IGNORED_LABEL, -1
    is_start = position + 1 in row.ends
    label = IGNORED_LABEL if is_start and not label_document_starts else int(row.tokens[position + 1])
    return int(row.tokens[position]), label, sum(end <= position for end in row.ends)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.lists(st.integers(1, 9), min_size=1, max_size=6)), min_size=1, max_size=5),
    st.integers(0, 20),
    st.booleans(),
)
def test_causal_is_the_row_shifted_by_one(many_lengths, spare, label_document_starts):
    """Each position against the definition; documents never fall along a row, and padding is one of its own.

    Caught mutations: ends counted as the last token of a document in place of one beyond; padding in the last
    document; a label masked at the document's first input in place of its first label; one number for all documents.
    """
    rows = [lengths and make_row(lengths) for lengths in many_lengths]
    seq_len = max([1, *(len(row.tokens) - 1 for row in rows if row)]) + spare
    arrays = Causal(seq_len, PAD, label_document_starts).assemble(rows, KEYS[: len(rows)])
    assert [array.dtype for array in arrays if array is not None] == [np.int64, np.int64, np.int32]
    for number, row in enumerate(rows):
        expected = [expected_position(row, position, label_document_starts) for position in range(seq_len)]
        assert arrays.tokens_BT[number].tolist() == [token for token, _, _ in expected]
        assert arrays.labels_BT[number].tolist() == [label for _, label, _ in expected]
        documents = arrays.documents_BT[number].tolist()
        assert documents == sorted(documents)
        found = {(document, expected[position][2]) for position, document in enumerate(documents)}
        assert len(found) == len({document for document, _ in found}) == len({wanted for _, wanted in found})


def test_causal_by_hand():
    rows = [make_row([2, 3]), None, Row(np.array([9], np.uint16), [1], 1)]
    arrays = Causal(5, PAD, label_document_starts=False).assemble(rows, KEYS[:3])
    assert arrays.tokens_BT.tolist() == [[1, 2, 3, 4, PAD], [PAD] * 5, [PAD] * 5]
    assert arrays.labels_BT.tolist() == [[2, -100, 4, 5, -100], [-100] * 5, [-100] * 5]
    assert arrays.documents_BT[0].tolist() == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("label_document_starts", [True, False])
def test_the_first_token_of_a_resumed_piece_is_no_label(label_document_starts):
    row = make_row([2, 3, 2])._replace(resumed=(2,))
    labels = Causal(6, PAD, label_document_starts).assemble([row], KEYS[:1]).labels_BT[0].tolist()
    assert labels == [2, 3 if label_document_starts else -100, 4, 5, -100, 7]


OBJECTIVES = {
    "causal": Causal(24, PAD, label_document_starts=True),
    "masked": Masked(24, PAD, MASK, 0.15),
    "spans": SpanCorruption(24, PAD, SENTINEL, num_spans=2, span_tokens=3),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("data") / "corpus")


def read_split(folder, objective: RowObjective, kind: str):
    """The rows of a split as an objective wants them cut, and the split's tokens."""
    manifest = load_manifest(folder, "train")
    packing = Packing(kind, objective.row_tokens, objective.overlap)
    store = open_store(manifest, DataConfig(folder=str(folder)))
    corpus = Corpus("corpus", manifest, packing, rows_of_shards(manifest, packing, Access()), store)
    rows = [corpus.read(*corpus.locate_unshuffled(number)) for number in range(corpus.num_rows)]
    shards = [store.open(n).read(0, int(tokens)) for n, tokens in enumerate(manifest.table["tokens"])]
    return rows, np.concatenate(shards)


@pytest.mark.parametrize("kind", ["concat", "bestfit", "none"])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_objectives_read_the_same_shards(folder, objective, kind):
    """Each kind of model gets rows that fit it, and over a pass sees each token of the split.

    Caught mutation: `Corpus` that cuts seq_len + 1 tokens whatever the objective wants.
    """
    rows, tokens = read_split(folder, objective, kind)
    assert sum(row.new_tokens for row in rows) == len(tokens)
    for first in range(0, len(rows), 40):
        some = [*rows[first : first + 40], None]
        arrays = objective.assemble(some, KEYS[: len(some)])
        assert {array.shape for array in arrays if array is not None} == {(len(some), 24)}
        assert (arrays.labels_BT[-1] == IGNORED_LABEL).all()
        assert (np.diff(arrays.documents_BT, axis=1) >= 0).all()


def test_masked_rows_hold_each_token_once(folder):
    """Without overlap, tokens and labels together are the split, each token once."""
    objective = OBJECTIVES["masked"]
    rows, tokens = read_split(folder, objective, "concat")
    arrays = objective.assemble(rows, np.arange(len(rows), dtype=np.uint64))
    is_hidden_BT = arrays.tokens_BT == MASK
    assert (is_hidden_BT == (arrays.labels_BT != IGNORED_LABEL)).all()
    assert 0.12 < is_hidden_BT.mean() < 0.18
    restored_BT = np.where(is_hidden_BT, arrays.labels_BT, arrays.tokens_BT)
    kept = np.concatenate([found[: len(row.tokens)] for found, row in zip(restored_BT, rows, strict=True)])
    assert kept.tolist() == tokens.tolist()


def test_spans_give_the_text_back(folder):
    objective = OBJECTIVES["spans"]
    rows, _ = read_split(folder, objective, "bestfit")
    for key, row in enumerate(rows[:200]):
        text, targets = objective.split(row.tokens.tolist(), key)
        spans = {}
        for token in targets:
            if token >= SENTINEL:
                spans[sentinel := token] = []
            else:
                spans[sentinel].append(token)
        restored = [token for place in text for token in spans.get(place, [place])]
        assert restored == row.tokens.tolist()
        assert len(text) + len(targets) <= objective.seq_len + 1


def test_a_row_depends_on_its_key_alone(folder):
    """The same row in another batch, at another place, is the same. Caught mutation: draws by the row's place."""
    rows, _ = read_split(folder, OBJECTIVES["masked"], "concat")
    together = OBJECTIVES["masked"].assemble(rows[:6], KEYS[10:16])
    alone = OBJECTIVES["masked"].assemble(rows[4:5], KEYS[14:15])
    other = OBJECTIVES["masked"].assemble(rows[4:5], KEYS[15:16])
    assert together.tokens_BT[4].tolist() == alone.tokens_BT[0].tolist() != other.tokens_BT[0].tolist()
