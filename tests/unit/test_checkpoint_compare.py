"""Going on from a checkpoint under a changed config or corpora: what is refused, and with which words.

Mutations seen to be caught: a stage that begins at the next row counted as begun; corpora compared whether or not they
were read; today's stages never looked at for one that the checkpoint lacks; every change of the math allowed once one
is; the ramp's stages before the step left out.
"""

from dataclasses import replace

import pytest

from megascale.checkpoint.compare import changed_values, check_changes, find_changes
from megascale.checkpoint.index import CheckpointIndex
from megascale.config.resume_rules import ChangeKind
from megascale.data.stream import CorpusRecord, StageRecord
from megascale.errors import CheckpointError
from tests.support.checkpoint_ranks import RUN, STREAM, state_at

ROWS_READ = {"nothing": 0, "code": 3, "all": 4}
"""Steps of 8 rows; the second mixture of STREAM begins at row 24, of which a run at step 3 has read nothing."""
RATE = {"optimizer": {"learning_rate": 0.1, "beta2": 0.95}}


def saved(step: int, **config) -> CheckpointIndex:
    run = replace(RUN, config=RUN.config | config)
    return CheckpointIndex("megascale-checkpoint", 3, run, state_at(step), None, {}, {})


def changed(**updates):
    return replace(RUN, **updates)


def changed_stream(**updates):
    return changed(stream=replace(STREAM, **updates))


def changes_of(step: int, now, planned_rows: int | None = None):
    return find_changes(saved(step), now, 8 * step if planned_rows is None else planned_rows)


def refusal(now, step: int = ROWS_READ["all"], allowed=(), then=None, planned_rows: int | None = None) -> str:
    with pytest.raises(CheckpointError) as refused:
        check_changes(
            find_changes(then or saved(step), now, 8 * step if planned_rows is None else planned_rows), allowed, "here"
        )
    return str(refused.value)


def test_the_same_run_and_safe_changes_pass():
    assert changes_of(4, RUN) == ()
    longer = changed(config={**RUN.config, "train": {"max_steps": 20}})
    assert [str(classed) for classed in changes_of(4, longer)] == ["safe: train.max_steps = 9 then, 20 now"]
    assert check_changes(changes_of(4, longer), (), "here") == ()


def test_every_other_change_is_refused_with_its_class_and_its_old_and_new_value():
    message = refusal(changed(
        config={"model": {"num_layers": 3, "rope_base": 1e4, "d_ff": 8, "dropout": 0.1}, "train": {"max_steps": 20}},
        validation={"code": "d3", "web": "other", "new": "d9"},
    ))
    assert message.startswith("here: ")
    assert "forbidden: model.num_layers = 2 then, 3 now (the weights have other shapes" in message
    assert "forbidden: model.d_ff = 'absent' then, 8 now" in message
    assert "changes the math: model.dropout = 'absent' then, 0.1 now" in message
    assert "changes the math: validation.web = 'd4' then, 'other' now" in message
    assert "add: --allow-change model.dropout --allow-change validation.web\n" in message
    assert "`megascale import`" in message
    assert "max_steps" not in message
    assert "d3" not in message
    assert "d9" not in message


def test_what_changes_the_math_needs_each_key_allowed():
    then = saved(4, **RATE)
    now = changed(config=RUN.config | {"optimizer": {"learning_rate": 0.2, "beta2": 0.99}})
    message = refusal(now, allowed={"optimizer.beta2", "run.seed"}, then=then)
    assert "add: --allow-change optimizer.learning_rate\n" in message
    assert "beta2" not in message
    assert "import" not in message
    both = check_changes(find_changes(then, now, 32), {"optimizer.beta2", "optimizer.learning_rate"}, "here")
    assert [(change.key, change.old, change.new) for change in both] == [
        ("optimizer.beta2", 0.95, 0.99), ("optimizer.learning_rate", 0.1, 0.2)
    ]


def test_what_is_forbidden_is_refused_whatever_is_allowed():
    now = changed(config=RUN.config | {"model": {"num_layers": 3, "rope_base": 1e4}})
    assert "model.num_layers = 2 then, 3 now" in refusal(now, allowed={"model.num_layers"})


def test_a_batch_that_moves_the_position_is_refused_with_the_ramp_that_keeps_it():
    """The run was on the second of two smaller batches; the ramp has to end where it stands."""
    stages = [{"until_step": 2, "global_batch_tokens": 64}, {"until_step": 6, "global_batch_tokens": 128}]
    then = saved(4, train={"global_batch_tokens": 256, "batch_ramp": stages})
    now = changed(config=RUN.config | {"train": {"global_batch_tokens": 512, "batch_ramp": []}})
    allowed = {"train.global_batch_tokens", "train.batch_ramp"}
    message = refusal(now, allowed=allowed, then=then, planned_rows=64)
    assert "forbidden: rows read by the first 4 steps = 32 then, 64 now" in message
    ramp = "[{until_step: 2, global_batch_tokens: 64}, {until_step: 4, global_batch_tokens: 128}]"
    assert f"train.batch_ramp = {ramp})" in message
    assert len(check_changes(find_changes(then, now, 32), allowed, "here")) == 2


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
    assert changes_of(ROWS_READ["code"], now) == ()
    assert words in refusal(now)


def test_the_next_rows_may_have_a_new_mixture_and_new_corpora():
    later = (*STREAM.stages, StageRecord(32, {"code": 1, "new": 16383}))
    with_new = STREAM.corpora | {"new": CorpusRecord("d5", 0.0)}
    assert changes_of(ROWS_READ["all"], changed_stream(stages=later, corpora=with_new)) == ()


@pytest.mark.parametrize(
    ("corpus", "kind", "words"),
    [
        (CorpusRecord("other", 0.0), ChangeKind.FORBIDDEN, "train split of corpus web = 'd2' then, 'other' now"),
        (CorpusRecord("d2", 0.25), ChangeKind.MATHS, "data.corpora.web.fim_fraction = 0.0 then, 0.25 now"),
        (None, ChangeKind.FORBIDDEN, "train split of corpus web = 'd2' then, 'absent' now"),
    ],
)
def test_a_corpus_is_fixed_once_it_was_read(corpus, kind, words):
    corpora = {"code": STREAM.corpora["code"]} | ({"web": corpus} if corpus else {})
    assert changes_of(ROWS_READ["code"], changed_stream(corpora=corpora)) == ()
    classed, = changes_of(ROWS_READ["all"], changed_stream(corpora=corpora))
    assert (classed.kind, str(classed.change)) == (kind, words)
    assert words in refusal(changed_stream(corpora=corpora))


def test_budgets_that_follow_the_length_of_the_run_are_explained():
    """`epochs` over max_steps: a longer run mixes otherwise from its first row on."""
    longer = changed(config={**RUN.config, "train": {"max_steps": 20}}, stream=replace(STREAM, stages=OTHER_MIXTURE))
    assert "data.horizon_steps" in refusal(longer)
    assert "data.horizon_steps" not in refusal(changed_stream(stages=OTHER_MIXTURE))


def test_before_the_first_row_everything_may_change():
    assert changes_of(ROWS_READ["nothing"], changed_stream(corpora={}, stages=())) == ()


def test_lists_are_values_and_order_counts():
    assert changed_values({"a": {"b": [1, 2]}}, {"a": {"b": [1, 2]}}) == []
    assert [change.key for change in changed_values({"a": {"b": [1, 2]}}, {"a": {"b": [2, 1]}})] == ["a.b"]
