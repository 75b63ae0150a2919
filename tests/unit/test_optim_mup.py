"""muP keeps activations in size over widths, and what the optimizer can't do is refused by name."""

from math import inf

import pytest

from megascale.config.layout_rules import layout_problems
from megascale.config.load import parse_config
from megascale.config.optimizer import OptimizerConfig
from megascale.errors import ConfigError
from megascale.train.coord_check import check_widths, measure, scaled_config, slope
from tests.support.layouts import LayoutCase, case_config

WIDTHS, STEPS = [32, 128], 3


def config_with(optimizer: dict, parallel: dict, model: dict | None = None):
    base = case_config(LayoutCase("case", 2, {})).model_dump(mode="json", exclude_unset=True)
    base["optimizer"] |= optimizer
    base["parallel"] = parallel
    base["model"] |= model or {}
    return parse_config(base, source="case")


def test_activations_over_widths():
    """By which powers of the width activations grow: theory has multiples of a half, so a quarter is the border.

    At the start a product over n inputs grows by n^.5 where all weights are equally large: the gated feed-forward
    layer, three of them, by 1.5, the logits by 0.5. muP takes that out, and n more of the logits. A step of Adam's is
    aligned with what it saw, so it adds n times as much at n inputs, and standard activations grow by 1 at least; with
    muP none grow. That attention's fall, by less than a half, is of these widths: by 0.36 from 32 to 128, by 0.25 from
    64 to 256.

    Mutations seen to be caught: learning rates of matrices not divided (attention grows by 1.43), initial values not
    divided, logits not divided (0.48 at the start). Sizes don't show how scores are scaled.
    """
    config = config_with({"learning_rate": 0.02}, {}, {"num_layers": 2, "d_ff": 64, "init_std": 0.1})
    at_start = {"standard": {"embedding": 0.0, "feed_forward": 1.5, "logits": 0.5},
                "muP": {"embedding": 0.0, "attention": 0.0, "feed_forward": 0.0, "blocks": 0.0, "logits": -0.5}}
    later = {"standard": (0.75, inf), "muP": (-0.5, 0.25)}
    for kind, theory in at_start.items():
        sizes = {(kind, width, step): found for width in WIDTHS
                 for step, found in enumerate(measure(scaled_config(config, width, WIDTHS[0], kind), STEPS))}
        powers = {what: slope(sizes, kind, 0, what, WIDTHS) for what in theory}
        assert all(abs(powers[what] - power) < 0.25 for what, power in theory.items()), (kind, powers)
        powers = {what: slope(sizes, kind, STEPS, what, WIDTHS) for what in ("attention", "feed_forward", "blocks")}
        assert all(later[kind][0] < power < later[kind][1] for power in powers.values()), (kind, powers)


def test_widths_that_heads_do_not_divide():
    config = config_with({}, {})
    assert check_widths([64, 32, 64], config) == [32, 64]
    with pytest.raises(ConfigError, match=r"multiples of 8, twice model.num_heads, such as 64,128,256"):
        check_widths([32, 44], config)
    with pytest.raises(ConfigError, match=r"family = palm and optimizer.kind = adamw: muP is there for"):
        scaled_config(config_with({}, {}, {"family": "palm", "num_kv_heads": 1}), 64, 32, "muP")


@pytest.mark.parametrize("kind", ["adafactor", "muon"])
@pytest.mark.parametrize(("parallel", "reason"), [
    ({"zero_stage": 2}, "ZeRO-2 keeps it in parts that no rank puts together; use zero_stage: 1"),
    ({"zero_stage": 3}, "ZeRO-3 keeps it in parts"),
    ({"offload_optimizer": "cpu"}, "its matrix products belong on the device; use offload_optimizer: none"),
])
def test_refused_layouts(kind, parallel, reason):
    (problem,) = layout_problems(config_with({"kind": kind}, parallel), 2)
    assert problem.startswith(f"optimizer.kind = {kind} with parallel.")
    assert reason in problem
    assert layout_problems(config_with({"kind": kind}, {"zero_stage": 1, "tp": 2}), 2) == []
    assert layout_problems(config_with({"kind": "lion"}, parallel), 2) == []


def test_mup_needs_learning_rates_that_it_knows():
    (problem,) = layout_problems(config_with({"kind": "muon"}, {}, {"mup_base_width": 16}), 2)
    assert "model.mup_base_width = 16 with optimizer.kind = muon" in problem


def test_an_average_to_validate():
    with pytest.raises(ValueError, match=r"validate_ema = true has no average to validate; set optimizer.ema_decay"):
        OptimizerConfig(learning_rate=0.1, validate_ema=True)
