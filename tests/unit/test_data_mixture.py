"""Weights, epochs and tokens as exact counts of a period."""

import random
from fractions import Fraction

import pytest

from megascale.config.batch_plan import BatchPlan, constant_batch
from megascale.config.data import DataConfig
from megascale.data.mixture import PERIOD, MixtureStage, resolve_mixture, steps_to_read
from megascale.errors import ConfigError

ROWS = {"code": 1000, "math": 300, "web": 5000}
SEQ_LEN = 16


def section(stages=(), horizon_steps=None, **corpora) -> DataConfig:
    """The config of a blend: `name=(field, value)`."""
    sources = {name: {"folder": f"/{name}", field: value} for name, (field, value) in corpora.items()}
    return DataConfig.model_validate({"corpora": sources, "stages": list(stages), "horizon_steps": horizon_steps})


def resolve(data: DataConfig, max_steps: int = 100, batches: BatchPlan | None = None, rows=ROWS):
    return resolve_mixture(data, rows, SEQ_LEN, batches or constant_batch(10), max_steps)


def test_one_corpus_takes_the_period():
    assert resolve(DataConfig(folder="/web"), rows={"corpus": 1}) == (MixtureStage(0, (PERIOD,)),)


def test_weights_are_shared_out_to_the_largest_remainders():
    """A period of 16384 over 1 : 1 : 1 leaves one row, which goes to the first name; the order of the file is moot."""
    data = section(web=("weight", 1.0), code=("weight", 1.0), math=("weight", 1.0))
    assert resolve(data) == (MixtureStage(0, (5462, 5461, 5461)),)
    assert resolve(section(web=("weight", 6.0), math=("weight", 1.0), code=("weight", 0.0))) == (
        MixtureStage(0, (0, 2341, 14043)),
    )


def test_counts_are_the_nearest_to_the_shares():
    """1,000 blends: each count is its share of the period to less than one row, and they add up.

    Caught mutation: the remainders given to nobody.
    """
    draw = random.Random(1)
    for _ in range(1000):
        weights = {name: draw.choice([0.0, draw.random(), 10 * draw.random()]) + 0.01 for name in ROWS}
        counts = resolve(section(**{name: ("weight", weight) for name, weight in weights.items()}))[0].counts
        assert sum(counts) == PERIOD
        shares = [PERIOD * Fraction(weight) / sum(map(Fraction, weights.values())) for weight in weights.values()]
        assert all(abs(count - share) < 1 for count, share in zip(counts, shares, strict=True))


def test_a_weight_that_rounds_to_nothing_is_refused_with_a_legal_one():
    weights = {"code": ("weight", 1.0), "math": ("weight", 1e-6), "web": ("weight", 3.0)}
    with pytest.raises(ConfigError, match=r"data\.corpora\.math\.weight = 1e-06 is a share of 2\.5e-07") as caught:
        resolve(section(**weights))
    legal = float(str(caught.value).partition("use ")[2].partition(" or more")[0])
    assert resolve(section(**{**weights, "math": ("weight", legal)}))[0].counts[1] == 1


def test_stages_begin_at_the_first_rows_of_their_steps():
    """With a batch that grows. Caught mutation: `from_step` times the first batch."""
    stages = [{"from_step": 5, "weights": {"math": 1}}, {"from_step": 500, "weights": {"web": 3, "code": 1}}]
    data = section(stages, web=("weight", 1.0), code=("weight", 0.0), math=("weight", 0.0))
    found = resolve(data, batches=BatchPlan((0, 3), (10, 40)))
    assert found == (
        MixtureStage(0, (0, 0, PERIOD)),
        MixtureStage(3 * 10 + 2 * 40, (0, PERIOD, 0)),
        MixtureStage(3 * 10 + 497 * 40, (PERIOD // 4, 0, 3 * PERIOD // 4)),
    )


def test_a_stage_weight_that_rounds_to_nothing_is_refused():
    data = section([{"from_step": 5, "weights": {"web": 1, "math": 1e-9}}], web=("weight", 1.0), math=("weight", 0.0))
    with pytest.raises(ConfigError, match=r"data\.stages\.0\.weights\.math = 1e-09 .* rounds to no row"):
        resolve(data)


def test_budgets_are_rounded_down_and_weights_take_the_rest():
    """1000 rows: half an epoch of math is 150 rows, 1600 tokens are 100. Caught mutation: budgets rounded up."""
    data = section(math=("epochs", 0.5), code=("tokens", 1600), web=("weight", 3.0))
    assert resolve(data) == (MixtureStage(0, (1638, 2457, PERIOD - 1638 - 2457)),)
    assert [PERIOD * 100 // 1000, PERIOD * 150 // 1000] == [1638, 2457]


def test_budgets_are_spread_over_the_horizon():
    data = section(horizon_steps=200, math=("epochs", 1), web=("weight", 1.0))
    assert resolve(data, max_steps=100) == resolve(data, max_steps=150) == resolve(
        section(math=("epochs", 1), web=("weight", 1.0)), max_steps=200
    )


def test_budgets_beyond_the_run_are_refused_with_the_steps_they_take():
    """1300 rows of budgets in steps of 10 take 130 steps; with these they are legal, and so are fewer epochs."""
    data = section(math=("epochs", 1), code=("epochs", 1))
    with pytest.raises(ConfigError, match=r"together 1,300 rows, more than the 1,000 rows of train\.max_steps = 100; "
                                          r"set it to 130 or more, or multiply the budgets by 0\.7692 or less"):
        resolve(data)
    assert resolve(data, 130) == (MixtureStage(0, (12603, 3781)),)
    assert sum(resolve(section(math=("epochs", 0.7692), code=("epochs", 0.769), web=("weight", 1)))[0].counts) == PERIOD


def test_a_run_longer_than_its_budgets_is_refused_with_the_steps_that_they_last():
    """Caught mutation: the rest of the period given to the budgets without a word."""
    data = section(math=("epochs", 1), code=("tokens", 1000 * SEQ_LEN))
    with pytest.raises(ConfigError, match=r"700 fewer than the 2,000 rows .* longer than its data; set it to 130"):
        resolve(data, 200)


def test_the_steps_that_a_message_names_are_legal():
    """300 budgets without weights: the number of steps in the refusal is accepted. Caught mutation: one step fewer."""
    draw, accepted = random.Random(2), 0
    for _ in range(300):
        data = section(math=("epochs", draw.uniform(0.1, 3)), code=("tokens", draw.randrange(1000, 60000)))
        batches = BatchPlan((0, 20), (draw.randrange(1, 9), draw.randrange(9, 50)))
        try:
            resolve(data, 60, batches)
        except ConfigError as error:
            steps = int(str(error).partition("set it to ")[2].partition(",")[0].partition(" ")[0])
            assert sum(resolve(data, steps, batches)[0].counts) == PERIOD
            accepted += 1
    assert accepted > 100


def test_a_budget_that_rounds_to_nothing_is_refused():
    data = section(math=("tokens", 32), web=("weight", 1.0))
    with pytest.raises(ConfigError, match=r"math\.tokens = 32: 2 of the 100,000 rows .* ask for 6\.1 rows or more"):
        resolve(data, 10_000)


def test_budgets_that_leave_nothing_for_a_weight_are_refused():
    data = section(code=("epochs", 1), web=("weight", 1.0))
    with pytest.raises(ConfigError, match=r"web\.weight = 1 .* of the 0 in 16384 rows .* lower the budgets"):
        resolve(data)


@pytest.mark.parametrize("rows", [1, 10, 11, 29, 30, 31, 70, 71, 1000])
def test_steps_to_read_is_the_fewest(rows):
    batches = BatchPlan((0, 3), (10, 40))
    steps = steps_to_read(batches, rows)
    assert batches.first_row(steps - 1) < rows <= batches.first_row(steps)
