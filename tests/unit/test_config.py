"""Config files: what is read, what is refused and in which words, what follows from it."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.config.derive import derive, describe
from megascale.config.dump import config_fingerprint, flat_values, json_schema, resolved_values, to_yaml
from megascale.config.load import load_config, parse_config, read_yaml
from megascale.config.resume_rules import keeps_maths
from megascale.errors import ConfigError
from tests.support.tiny_run import write_config


@pytest.fixture
def tiny(tmp_path) -> Path:
    return write_config(tmp_path, tmp_path / "corpus")


def refusal(path: Path, *overrides: str, num_ranks: int = 1) -> str:
    with pytest.raises(ConfigError) as caught:
        derive(load_config(path, list(overrides)), num_ranks, source=str(path))
    return str(caught.value)


def test_scientific_notation_without_a_point_is_a_number(tiny):
    assert load_config(tiny).optimizer.learning_rate == 3e-3
    assert load_config(tiny, ["optimizer.learning_rate=1e-4"]).optimizer.learning_rate == 1e-4


@pytest.mark.parametrize("text", ["3e-4", "3E-4", "3.e-4", ".3e-3", "3.0e-4", "+3e-4", "300e-6"])
def test_floats_as_people_write_them(text, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f"value: {text}\n")
    assert read_yaml(path)["value"] == pytest.approx(3e-4)


@pytest.mark.parametrize(("text", "value"), [("12", 12), ("0x10", 16), ("e5", "e5"), ("1.2.3", "1.2.3"), ("~", None),
                                              ("true", True), ("'3e-4'", "3e-4"), ("-", "-")])
def test_other_scalars_stay_what_they_are(text, value, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f"value: {text}\n" if text != "-" else "value: '-'\n")
    assert read_yaml(path)["value"] == value


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("train:\n  seq_len: 1\n  max_steps: 2\n  seq_len: 3\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: key `seq_len` stands twice, in lines 2 and 4; keep one"):
        read_yaml(path)


def test_misspelt_keys_name_the_nearest(tiny):
    message = refusal(tiny, "optimizer.learnign_rate=1e-3", "trian.seq_len=4")
    assert "unknown key `optimizer.learnign_rate`; did you mean `learning_rate`?" in message
    assert "unknown key `trian`; did you mean `train`?" in message
    assert "did you mean `project`" in refusal(tiny, "observe.wandb.projet=x")


def test_wrong_types_show_what_was_given(tiny):
    assert "train.max_steps = 'many' (str): input should be a valid integer" in refusal(tiny, "train.max_steps=many")
    assert "train.max_steps = 2.5 (float)" in refusal(tiny, "train.max_steps=2.5")
    assert "parallel.zero_stage = 4" in refusal(tiny, "parallel.zero_stage=4")
    assert "train.compile = 'maybe' (str)" in refusal(tiny, "train.compile=maybe")


def test_missing_keys_are_named(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("run: {name: a, folder: b}\n")
    assert "`model` is missing and has no default" in refusal(path)


@pytest.mark.parametrize("text", ["", "- a\n", "a: [1\n", "1: 2\n"])
def test_files_that_are_no_config(text, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    assert str(path) in refusal(path)
    assert "can't be read" in refusal(tmp_path / "missing.yaml")


def test_unsafe_yaml_tags_are_refused(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("run: !!python/object/apply:os.system ['true']\n")
    assert "not valid YAML" in refusal(path)


def test_base_is_merged_by_section_and_only_once(tmp_path, tiny):
    child = tmp_path / "child.yaml"
    child.write_text(f"base: {tiny.name}\ntrain: {{max_steps: 7}}\n")
    config = load_config(child)
    assert (config.train.max_steps, config.train.seq_len) == (7, 32)
    grandchild = tmp_path / "grandchild.yaml"
    grandchild.write_text("base: child.yaml\n")
    assert "one parent is allowed" in refusal(grandchild)


def test_overrides_come_last_and_must_be_assignments(tiny):
    assert load_config(tiny, ["train.max_steps=3", "train.max_steps=4"]).train.max_steps == 4
    assert load_config(tiny, ["observe.wandb.tags=[a, b]"]).observe.wandb.tags == ("a", "b")
    assert "is not of the form section.key=value" in refusal(tiny, "train.max_steps")
    assert "`max_steps` is a value, not a section" in refusal(tiny, "train.max_steps.x=1")


def test_batch_that_does_not_divide_names_the_nearest(tiny):
    assert refusal(tiny, num_ranks=3) == (
        f"{tiny}: train.global_batch_tokens = 256 is not a multiple of micro_batch_size 2 x seq_len 32 x dp 3 = 192;"
        " the nearest are 192 or 384"
    )


def test_sequence_longer_than_positions(tiny):
    message = refusal(tiny, "train.seq_len=64")
    assert "train.seq_len = 64 is longer than model.max_seq_len = 32" in message
    assert "use at most 32" in message


def test_warm_up_longer_than_the_schedule(tiny):
    assert "use at most 11" in refusal(tiny, "optimizer.warmup_steps=12")


@given(rows=st.integers(1, 64), micro=st.integers(1, 8), dp=st.integers(1, 8))
@settings(deadline=None, max_examples=60)
def test_the_batch_is_the_product_of_its_factors(rows, micro, dp, tmp_path_factory):
    path = write_config(tmp_path_factory.mktemp("c"), Path("corpus"))
    overrides = [f"train.global_batch_tokens={rows * 32}", f"train.micro_batch_size={micro}"]
    config = load_config(path, overrides)
    if rows % (micro * dp):
        with pytest.raises(ConfigError):
            derive(config, dp)
        return
    derived = derive(config, dp)
    assert micro * derived.num_micro_batches * derived.dp * config.train.seq_len == derived.tokens_per_step == rows * 32
    printed = dict(describe(config, derived))["tokens per step"]
    factors = f"micro-batch {micro} x accumulation {derived.num_micro_batches} x dp {dp} x seq_len 32"
    assert printed == f"{rows * 32:,} = {factors}"


RAMP = "train.batch_ramp=[{until_step: 2, global_batch_tokens: 64}, {until_step: 5, global_batch_tokens: 128}]"


def test_a_batch_ramp_adds_up(tiny):
    """2 steps of 2 rows, 3 of 4 and 7 of 8."""
    config = load_config(tiny, [RAMP])
    derived = derive(config, 1)
    assert (derived.batches.first_steps, derived.batches.sizes) == ((0, 2, 5), (2, 4, 8))
    assert derived.total_tokens == 32 * (2 * 2 + 3 * 4 + 7 * 8)
    printed = dict(describe(config, derived))
    assert printed["batch ramp"] == "2 rows from step 0, 4 rows from step 2, 8 rows from step 5"
    assert "train.batch_ramp.0.global_batch_tokens = 64 is not a multiple of" in refusal(tiny, RAMP, num_ranks=2)


def test_a_pipeline_must_run_each_size_of_the_batch(tiny):
    def overrides(first: int) -> list[str]:
        return [f"train.batch_ramp=[{{until_step: 2, global_batch_tokens: {32 * first}}}]", "train.micro_batch_size=1",
                "parallel.pp=2", "parallel.schedule=interleaved_1f1b", "model.num_layers=4"]

    assert derive(load_config(tiny, overrides(4)), 2).num_micro_batches == 8
    message = refusal(tiny, *overrides(5), num_ranks=2)
    assert "can't run 5 micro-batches (batch_ramp.0.global_batch_tokens 160 / 32)" in message


def test_the_resolved_config_reads_back_as_itself(tiny, tmp_path):
    values = resolved_values(load_config(tiny))
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(values))
    assert resolved_values(load_config(path)) == values
    assert None not in (values["model"]["num_kv_heads"], values["model"]["d_ff"], values["optimizer"]["horizon_steps"])


def test_the_fingerprint_follows_what_is_computed_and_nothing_else(tiny):
    def fingerprint(*overrides):
        return config_fingerprint(resolved_values(load_config(tiny, list(overrides))))

    same = ["run.folder=x", "parallel.zero_stage=3", "observe.log_interval_steps=5", "train.micro_batch_size=1",
            "train.recompute=full", "train.recompute_parts=[attention]", "train.recompute_every=2",
            "train.offload_activations=true", "parallel.schedule=gpipe", "checkpoint.keep_last=9"]
    selective = "train.recompute=selective"  # the settings of recompute go with no other mode
    assert all(fingerprint(selective, override) == fingerprint() for override in same)
    other = ["run.seed=4", "optimizer.learning_rate=1e-3", "train.max_steps=13", "model.d_ff=128",
             "train.global_batch_tokens=512", "data.window_rows=8", "precision.dtype=bf16",
             "data.document_mask=true", "model.window=8"]
    assert len({fingerprint(), *(fingerprint(override) for override in other)}) == 1 + len(other)
    eight_bits = fingerprint("precision.dtype=bf16", "precision.fp8_linear=true")
    assert eight_bits != fingerprint("precision.dtype=bf16")
    assert fingerprint("optimizer.horizon_steps=12", "train.max_steps=40") == fingerprint()


def test_every_key_is_either_maths_or_not(tiny):
    keys = flat_values(resolved_values(load_config(tiny)))
    assert {key for key in keys if keeps_maths(key)} >= {"run.name", "parallel.tp", "observe.wandb.mode"}
    assert [key for key in keys if keeps_maths(key) and key.startswith(("model.", "optimizer."))] == [
        "optimizer.validate_ema"]


def test_the_schema_knows_every_section_and_the_base():
    schema = json.loads(json_schema())
    assert {"run", "model", "train", "base"} <= set(schema["properties"])


def test_parse_config_names_its_source():
    with pytest.raises(ConfigError, match="step_7: unknown key `x`"):
        parse_config({"x": 1}, source="step_7")
