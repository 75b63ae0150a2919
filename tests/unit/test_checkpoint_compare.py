"""Continuing a checkpoint under a changed config or corpora: what is refused, and with which words.

Mutations seen to be caught: a stage that begins at the next row counted as begun; corpora compared whether or not they
were read; today's stages never looked at for one that the checkpoint lacks.
"""

from dataclasses import replace

import pytest

from megascale.checkpoint.compare import changed_values, check_same_run
from megascale.checkpoint.index import CheckpointIndex
from megascale.data.stream import CorpusRecord, StageRecord
from megascale.errors import CheckpointError
from tests.support.checkpoint_ranks import RUN, STREAM, state_at

ROWS_READ = {"nothing": 0, "code": 3, "all": 4}
"""Steps of 8 rows; the second mixture of STREAM begins at row 24, of which a run at step 3 has read nothing."""


def is_safe(key: str) -> bool:
    return key == "train.max_steps"


def saved(step: int) -> CheckpointIndex:
    return CheckpointIndex("megascale-checkpoint", 2, RUN, state_at(step), {}, {})


def changed(**updates):
    return replace(RUN, **updates)


def changed_stream(**updates):
    return changed(stream=replace(STREAM, **updates))


def refusal(now, step: int = ROWS_READ["all"]) -> str:
    with pytest.raises(CheckpointError) as refused:
        check_same_run(saved(step), now, is_safe)
    return str(refused.value)


def test_the_same_run_and_safe_changes_pass():
    assert check_same_run(saved(4), RUN, is_safe) == []
    longer = changed(config={**RUN.config, "train": {"max_steps": 20}})
    assert [str(change) for change in check_same_run(saved(4), longer, is_safe)] == [
        "train.max_steps = 9 then, 20 now"
    ]


def test_every_other_change_is_refused_with_its_old_and_new_value():
    message = refusal(changed(
        config={"model": {"num_layers": 3, "rope_base": 1e4, "d_ff": 8}, "train": {"max_steps": 20}},
        validation={"code": "d3", "web": "other", "new": "d9"},
    ))
    assert "model.num_layers = 2 then, 3 now" in message
    assert "model.d_ff = 'absent' then, 8 now" in message
    assert "validation split of corpus web = 'd4' then, 'other' now" in message
    assert "max_steps" not in message
    assert "d3" not in message
    assert "d9" not in message


OTHER_MIXTURE = (STREAM.stages[0], StageRecord(24, {"code": 8192, "web": 8192}))


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (STREAM.stages[:1], "mixture from row 24, of 32 rows read = {'code': 4096, 'web': 12288} then, 'absent' now"),
        (OTHER_MIXTURE, "mixture from row 24, of 32 rows read = {'code': 4096, 'web': 12288} then, {'code': 8192, "),
        ((*STREAM.stages, StageRecord(31, {"code": 16384})), "mixture from row 31, of 32 rows read = 'absent' then, "),
    ],
)
def test_a_mixture_is_fixed_once_it_has_begun(stages, words):
    now = changed_stream(stages=stages)
    assert check_same_run(saved(ROWS_READ["code"]), now, is_safe) == []
    assert words in refusal(now)


def test_the_next_rows_may_have_a_new_mixture_and_new_corpora():
    later = (*STREAM.stages, StageRecord(32, {"code": 1, "new": 16383}))
    with_new = STREAM.corpora | {"new": CorpusRecord("d5", 0.0)}
    assert check_same_run(saved(ROWS_READ["all"]), changed_stream(stages=later, corpora=with_new), is_safe) == []


@pytest.mark.parametrize(
    ("corpus", "words"),
    [
        (CorpusRecord("other", 0.0), "train split of corpus web = 'd2' then, 'other' now"),
        (CorpusRecord("d2", 0.25), "fim_fraction of corpus web = 0.0 then, 0.25 now"),
        (None, "corpus web = 'd2' then, 'absent' now"),
    ],
)
def test_a_corpus_is_fixed_once_it_was_read(corpus, words):
    corpora = {"code": STREAM.corpora["code"]} | ({"web": corpus} if corpus else {})
    assert check_same_run(saved(ROWS_READ["code"]), changed_stream(corpora=corpora), is_safe) == []
    assert words in refusal(changed_stream(corpora=corpora))


def test_budgets_that_follow_the_length_of_the_run_are_explained():
    """`epochs` over max_steps: a longer run mixes otherwise from its first row on."""
    longer = changed(config={**RUN.config, "train": {"max_steps": 20}}, stream=replace(STREAM, stages=OTHER_MIXTURE))
    assert "data.horizon_steps" in refusal(longer)
    assert "data.horizon_steps" not in refusal(changed_stream(stages=OTHER_MIXTURE))


def test_before_the_first_row_everything_may_change():
    assert check_same_run(saved(ROWS_READ["nothing"]), changed_stream(corpora={}, stages=()), is_safe) == []


def test_lists_are_values_and_order_counts():
    assert changed_values({"a": {"b": [1, 2]}}, {"a": {"b": [1, 2]}}) == []
    assert [change.key for change in changed_values({"a": {"b": [1, 2]}}, {"a": {"b": [2, 1]}})] == ["a.b"]
