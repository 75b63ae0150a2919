"""Every key of the config has a class, and only keys that change the math can be allowed to."""

import pytest

from megascale.config.load import load_config
from megascale.config.resume_rules import (
    FORBIDDEN_KEYS,
    MATHS_KEYS,
    SAFE_KEYS,
    ChangeKind,
    batch_ramp_until,
    check_allowed_keys,
    class_of,
    class_of_change,
    config_keys,
)
from megascale.errors import ConfigError
from tests.support.tiny_run import write_blend

WHOLE_SECTIONS = {"parallel", "evaluate", "checkpoint", "observe", "precision", "data.cache", "data.fim",
                  "data.corpora", "model.rope_scaling"}
"""Sections that are of one class by what they are for; every key of the others is named."""


@pytest.fixture
def config(tmp_path):
    return load_config(write_blend(tmp_path))


def rules_for(key: str) -> list[str]:
    rules = (*SAFE_KEYS, *MATHS_KEYS, *FORBIDDEN_KEYS)
    return [rule for rule in rules if key == rule or (rule.endswith(".") and key.startswith(rule))]


def test_every_key_of_the_schema_has_one_class_and_every_rule_has_a_key():
    """A new key has to be thought about: without a rule it fails here, and a resume refuses it."""
    keys = [*config_keys()]
    assert len(keys) > 80
    assert {key: rules_for(key) for key in keys if len(rules_for(key)) != 1} == {}
    idle = {rule for rule in (*SAFE_KEYS, *MATHS_KEYS, *FORBIDDEN_KEYS) if not any(rule in rules_for(k) for k in keys)}
    assert idle == {"data.corpora."}
    assert {rule.removesuffix(".") for rule in (*SAFE_KEYS, *MATHS_KEYS) if rule.endswith(".")} == WHOLE_SECTIONS


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("parallel.tp", ChangeKind.SAFE), ("data.corpora.web.folder", ChangeKind.SAFE),
        ("optimizer.learning_rate", ChangeKind.MATHS), ("run.seed", ChangeKind.MATHS),
        ("optimizer.kind", ChangeKind.FORBIDDEN), ("model.num_heads", ChangeKind.FORBIDDEN),
        ("train.seq_len", ChangeKind.FORBIDDEN),
        ("data.new_key", ChangeKind.FORBIDDEN), ("train.max_steps2", ChangeKind.FORBIDDEN),
    ],
)
def test_classes(key, kind):
    assert class_of(key)[0] is kind
    assert bool(class_of(key)[1]) == (kind is ChangeKind.FORBIDDEN)


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [("loss", "none", ChangeKind.MATHS), ("loss", "bias", ChangeKind.FORBIDDEN),
     ("bias", "none", ChangeKind.FORBIDDEN)],
)
def test_a_run_does_not_change_to_biases_that_its_checkpoint_lacks(old, new, kind):
    found, reason = class_of_change("model.moe.balance", old, new)
    assert found is kind
    assert ("has the biases of the experts" in reason) == (kind is ChangeKind.FORBIDDEN)


def test_keys_that_may_be_allowed(config):
    check_allowed_keys(["optimizer.beta2", "train.micro_batch_size", "data.corpora.web.fim_fraction",
                        "validation.code", "precision.dtype"], config)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("optimizer.learning_rte", "there is no such key; did you mean `optimizer.learning_rate`?"),
        ("validation.wbe", "did you mean `validation.web`?"),
        ("xyzzy", "it is a dotted key"),
        ("model.d_model", "can't be allowed: the weights have other shapes"),
        ("data.window_rows", "can't be allowed: row numbers would mean other rows"),
    ],
)
def test_keys_that_may_not(config, key, words):
    with pytest.raises(ConfigError) as refused:
        check_allowed_keys(["optimizer.beta2", key], config)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("step", "ramp"),
    [
        (1, "[{until_step: 1, global_batch_tokens: 64}]"),
        (2, "[{until_step: 2, global_batch_tokens: 64}]"),
        (3, "[{until_step: 2, global_batch_tokens: 64}, {until_step: 3, global_batch_tokens: 256}]"),
    ],
)
def test_the_ramp_that_tells_the_batches_so_far(step, ramp):
    """Mutation seen to be caught: a stage that ends at the step counted as over."""
    train = {"batch_ramp": [{"until_step": 2, "global_batch_tokens": 64}], "global_batch_tokens": 256}
    assert batch_ramp_until(train, step) == ramp
