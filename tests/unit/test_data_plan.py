"""What a run will read: counted before it starts, and refused when it would read too much."""

import re

import numpy as np
import pytest

from megascale.config.batch_plan import BatchPlan, constant_batch
from megascale.config.data import DataConfig
from megascale.data.mixture import resolve_mixture
from megascale.data.order import CorpusShape, RowOrder
from megascale.data.plan import describe_plan, plan_reading
from megascale.errors import DataError

SEQ_LEN = 16
SHARDS = {"code": [400, 600], "math": [300], "web": [2500, 2500]}
TOKENS = {"code": 15_990, "math": 4_800, "web": 79_999}
TABLE = [
    ("reads", "steps 0 to 79: 800 rows, 12,799 tokens"),
    ("  math", "50.00%: 400 rows, 6,400 tokens; 1.333 epochs by then"),
    ("  web", "50.00%: 400 rows, 6,399 tokens; 0.080 epochs by then"),
    ("reads", "steps 80 to 99: 200 rows, 3,200 tokens"),
    ("  web", "100.00%: 200 rows, 3,200 tokens; 0.120 epochs by then"),
    ("reads again", "math from step 60"),
]
RAMP = BatchPlan((0, 50), (10, 40))


def plan(corpora: dict, max_steps: int, batches: BatchPlan | None = None, stages=()):
    """The plan of a blend, and its order."""
    batches = batches or constant_batch(10)
    sources = {name: {"folder": f"/{name}", **fields} for name, fields in corpora.items()}
    data = DataConfig.model_validate({"corpora": sources, "stages": list(stages)})
    rows = {name: sum(SHARDS[name]) for name in data.sources}
    mixture = resolve_mixture(data, rows, SEQ_LEN, batches, max_steps)
    order = RowOrder([CorpusShape(name, np.array(SHARDS[name])) for name in data.sources], mixture, 3, num_lanes=4)
    return plan_reading(order, [TOKENS[name] for name in data.sources], data, SEQ_LEN, batches, max_steps), order


def test_a_plan_counts_what_the_order_gives():
    """Rows and epochs of each stage against the located rows, with a ramp.

    Caught mutation: shares that count earlier stages.
    """
    stages = [{"from_step": 60, "weights": {"math": 1, "web": 1}}, {"from_step": 5000, "weights": {"web": 1}}]
    found, order = plan({"web": {"weight": 3}, "code": {"weight": 1}, "math": {"weight": 0}}, 80, RAMP, stages)
    bounds = [0, RAMP.first_row(60), RAMP.first_row(80)]
    assert [(stage.first_step, stage.stop_step) for stage in found.stages] == [(0, 60), (60, 80)]
    corpora = order.locate(np.arange(bounds[-1])).corpora
    for stage, first, stop in zip(found.stages, bounds, bounds[1:], strict=False):
        counts = np.bincount(corpora[first:stop], minlength=3)
        names = [corpus.name for corpus in order.corpora]
        read = {part.name: part.rows for part in stage.parts}
        assert read == {name: count for name, count in zip(names, counts.tolist(), strict=True) if count}
        for part in stage.parts:
            corpus = names.index(part.name)
            assert part.share == counts[corpus] / counts.sum()
            assert part.epochs == np.count_nonzero(corpora[:stop] == corpus) / order.num_rows[corpus]


def test_whole_epochs_have_all_tokens():
    found, _ = plan({"code": {"weight": 1}}, 300)
    assert found.stages[0].parts[0].tokens == 3 * TOKENS["code"]


def test_the_step_that_reads_again_is_named():
    """Step s is the first that reads a row of the second epoch.

    Caught mutations: a step late; a limit refused when met.
    """
    found, order = plan({"web": {"weight": 1}, "math": {"weight": 1}}, 100)
    (name, step), = found.second_epochs
    epochs = order.locate(np.arange(1000))
    again = np.flatnonzero((epochs.epochs == 1) & (epochs.corpora == 0))
    assert (name, step) == ("math", again[0] // 10)
    assert plan({"web": {"weight": 1}, "math": {"weight": 1}}, step)[0].second_epochs == ()


def test_max_epochs_is_kept_to_the_row():
    """As many steps as the message allows are accepted, one more is refused.

    Caught mutations: a step late; slack for weights.
    """
    corpora = {"web": {"weight": 2}, "math": {"weight": 1, "max_epochs": 1.5}}
    with pytest.raises(DataError, match=r"math\.max_epochs = 1\.5 allows 450 rows .* which has 300") as caught:
        plan(corpora, 400, RAMP)
    step = int(re.search(r"in step ([\d,]+);", str(caught.value))[1])
    assert f"max_steps to {step} or less" in str(caught.value)
    assert plan(corpora, step, RAMP)[0].stages[-1].parts[0].epochs <= 1.5
    with pytest.raises(DataError, match=f"beyond the limit in step {step};"):
        plan(corpora, step + 1, RAMP)


def test_a_stage_beyond_the_limit_is_refused():
    corpora = {"web": {"weight": 1}, "math": {"weight": 0, "max_epochs": 1}}
    stages = [{"from_step": 50, "weights": {"math": 1}}]
    plan(corpora, 80, stages=stages)
    with pytest.raises(DataError, match=r"would read 310, which is 1\.033 epochs, and go beyond the limit in step 80"):
        plan(corpora, 81, stages=stages)


@pytest.mark.parametrize("budget", [{"epochs": 2}, {"tokens": 600 * SEQ_LEN}, {"epochs": 2, "max_epochs": 2}])
def test_a_budget_within_its_horizon_is_accepted(budget):
    found, _ = plan({"web": {"weight": 1}, "math": budget}, 500)
    math = found.stages[0].parts[0]
    assert math.rows == pytest.approx(600, abs=5)


def test_budgets_alone_are_accepted_to_their_last_step():
    found, _ = plan({"code": {"epochs": 1}, "math": {"epochs": 1}}, 130)
    assert [part.epochs for part in found.stages[0].parts] == pytest.approx([1, 1], abs=0.01)


def test_a_run_beyond_the_horizon_of_its_budgets_is_refused():
    sources = {"web": {"folder": "/web", "weight": 1}, "math": {"folder": "/math", "epochs": 1}}
    data = DataConfig.model_validate({"corpora": sources, "horizon_steps": 100})
    batches, rows = constant_batch(10), {"math": 300, "web": 5000}
    mixture = resolve_mixture(data, rows, SEQ_LEN, batches, 200)
    order = RowOrder([CorpusShape(name, np.array(SHARDS[name])) for name in rows], mixture, 3, num_lanes=4)
    with pytest.raises(DataError, match=r"allows 300 rows .* would read 600, .* lower train\.max_steps to 100"):
        plan_reading(order, [4_800, 79_999], data, SEQ_LEN, batches, 200)


def test_the_table_for_people():
    stages = [{"from_step": 80, "weights": {"web": 1}}]
    assert describe_plan(plan({"web": {"weight": 1}, "math": {"weight": 1}}, 100, stages=stages)[0]) == TABLE
    assert describe_plan(plan({"web": {"weight": 1}}, 10)[0])[-1] == ("reads again", "nothing: no corpus is read twice")
