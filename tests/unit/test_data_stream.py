"""The stream of a blend, its ledger and its digest."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.config.derive import derive
from megascale.data.ledger import (
    NO_DIGEST,
    NOTHING_READ,
    ReadCounts,
    StepCounts,
    add_counts,
    chain_digest,
    count_rows,
    digest_rows,
)
from megascale.data.row import Row
from megascale.data.stream import open_validation, plan_stream
from megascale.errors import DataError
from tests.support.corpus import make_corpus
from tests.support.streams import open_test_stream, stream_config


@pytest.fixture(scope="module")
def blend(tmp_path_factory):
    """Three corpora of different sizes, one of them without a validation split."""
    folder = tmp_path_factory.mktemp("data")
    for seed, (name, count) in enumerate({"code": 40, "web": 90, "wiki": 10}.items()):
        make_corpus(folder / name, count, seed=seed, num_validation_documents=0 if name == "wiki" else 8)
    return {name: {"folder": str(folder / name), "weight": weight}
            for name, weight in {"code": 0.25, "web": 0.5, "wiki": 0.25}.items()}


def row_of(tokens: list[int], new_tokens: int = 1) -> Row:
    return Row(np.array(tokens, np.uint16), [len(tokens)], new_tokens)


def test_the_ledger_of_a_blend_is_its_plan(blend):
    """Rows of each corpus are those of the order; tokens of whole epochs are those of the corpora, to the token."""
    config = stream_config(blend, train={"max_steps": 100})
    stream = open_test_stream(config)
    plan = plan_stream(config, derive(config, 1), stream)
    read = stream.read(np.arange(1200))
    counts = count_rows(3, read.places.corpora, np.arange(1200), read.rows, labels=0).read
    assert [each.rows for each in counts] == stream.order.rows_before(1200).tolist()
    assert [each.rows for each in counts] == [part.rows for part in plan.stages[0].parts]
    for number, (corpus, each) in enumerate(zip(stream.corpora, counts, strict=True)):
        whole, rest = divmod(each.rows, corpus.num_rows)
        own = [row for row, at in zip(read.rows, read.places.corpora, strict=True) if at == number]
        assert each.tokens == whole * corpus.manifest.num_tokens + sum(row.new_tokens for row in own[len(own) - rest :])
    assert counts[2].rows > 2 * stream.corpora[2].num_rows


def test_a_corpus_without_validation_is_left_out(blend):
    assert [corpus.name for corpus in open_validation(stream_config(blend))] == ["code", "web"]
    with pytest.raises(DataError, match="holds no finished split 'validation'"):
        open_validation(stream_config({"wiki": blend["wiki"]}))


def test_other_tokenizers_are_refused_by_name(blend, tmp_path):
    other = {"other": {"folder": str(make_corpus(tmp_path / "other", vocab_size=90)), "weight": 1.0}}
    with pytest.raises(DataError, match=r"'code' and 'other' were made with different tokenizers: sha256 .* megascale"):
        open_test_stream(stream_config(blend | other))


def test_the_record_names_what_the_rows_depend_on(blend):
    stages = [{"from_step": 4, "weights": {"web": 1.0}}]
    record = open_test_stream(stream_config(blend, data={"stages": stages})).describe()
    assert set(record.corpora) == {"code", "web", "wiki"}
    assert [(stage.first_row, stage.counts) for stage in record.stages] == [
        (0, {"code": 4096, "web": 8192, "wiki": 4096}), (48, {"code": 0, "web": 16384, "wiki": 0}),
    ]


rows_strategy = st.lists(st.none() | st.lists(st.integers(0, 9), min_size=1, max_size=4).map(row_of), min_size=1,
                         max_size=12)


@settings(deadline=None, max_examples=300)
@given(rows_strategy, st.integers(0, 2**40), st.data())
def test_counts_and_digests_of_parts_add_up(rows, first, data):
    """However rows are dealt out. Caught mutation: digests of the rows joined in their order before they are summed."""
    numbers, corpora = first + np.arange(len(rows)), np.arange(len(rows)) % 2
    order = np.array(data.draw(st.permutations(range(len(rows)))))
    cut = data.draw(st.integers(0, len(rows)))
    whole = count_rows(2, corpora, numbers, rows, labels=len(rows))
    parts = [count_rows(2, corpora[part], numbers[part], [rows[at] for at in part], labels=len(part))
             for part in (order[:cut], order[cut:])]
    total = np.sum([part.to_vector() for part in parts], axis=0).tolist()
    assert StepCounts.from_vector(total) == whole
    assert sum(each.masked_rows for each in whole.read) == rows.count(None)
    assert 0 <= whole.digest_sum < len(rows) << 40


def test_a_digest_tells_tokens_places_and_steps_apart():
    """Caught mutations: a digest without the row number; without the tokens; a chain that adds instead of hashing."""
    cases = [([1, 2], [3, 4]), ([2, 1], [3, 4]), ([1, 3], [3, 4]), ([1, 2], [3, 5]), ([1, 2], [3, 0])]
    digests = [
        digest_rows(np.array(numbers), [row_of([token]) if token else None for token in tokens])
        for numbers, tokens in cases
    ]
    assert len(set(digests)) == len(digests)
    chains = {chain_digest(chain_digest(NO_DIGEST, a), b) for a, b in [(5, 9), (9, 5), (0, 14), (14, 0)]}
    assert len(chains) == 4


def test_digests_are_for_ever():
    """Written once: a run's digest must mean the same in every version."""
    assert digest_rows(np.array([7, 8]), [row_of([1, 2, 3]), None]) == 749400463349
    assert chain_digest(NO_DIGEST, 12345) == "22118258a9d111a0"


def test_a_ledger_names_what_was_read():
    ledger = add_counts({}, ["code", "web"], [ReadCounts(2, 9, 0), NOTHING_READ])
    assert ledger == {"code": ReadCounts(2, 9, 0)}
    assert add_counts(ledger, ["new", "web"], [ReadCounts(1, 3, 1), NOTHING_READ]) == {
        "code": ReadCounts(2, 9, 0), "new": ReadCounts(1, 3, 1),
    }
