"""What an export says of itself: the plan of its files, sizes on the command line, and the model card."""

from dataclasses import replace

import pytest
import yaml

from launcher.export import parse_size
from megascale.checkpoint.index import Change, CheckpointIndex, LineageRecord
from megascale.config.model import ModelConfig
from megascale.errors import ConfigError
from megascale.export.card import write_card
from megascale.export.hf_config import choose_architecture, derive_hf_config
from megascale.export.hf_plan import Unit, plan_shards, plan_units
from megascale.model.flops import num_parameters
from tests.support.checkpoint_ranks import RUN, state_at

LLAMA = {"family": "llama", "num_layers": 2, "d_model": 64, "num_heads": 4, "vocab_size": 100, "max_seq_len": 48}
SECRET = "s3://user:hunter2@corpora/web"


def make_index(model: dict = LLAMA, **state) -> CheckpointIndex:
    config = {
        "run": {"name": "card|<b>", "folder": "/home/somebody/runs/x", "seed": 7}, "model": model,
        "data": {"folder": SECRET}, "train": {"seq_len": 32, "global_batch_tokens": 256, "max_steps": 9},
        "optimizer": {"learning_rate": 0.25}, "precision": {"dtype": "bf16"},
    }
    turns = (
        LineageRecord("import", 0, "/home/somebody/llama", None, ()),
        LineageRecord("fork", 2, "/home/somebody/runs/b", "run-b", (
            Change("optimizer.learning_rate", 0.1, 0.25), Change("data.folder", SECRET, "/home/somebody/web"))),
    )
    run = replace(RUN, config=config, lineage=turns)
    return CheckpointIndex("megascale-checkpoint", 3, run, replace(state_at(6), **state), None, {}, {})


def card_of(index, metrics=()):
    hf_config = derive_hf_config(ModelConfig(**index.run.config["model"]), eos_id=5, dtype="float32")
    return write_card(index, hf_config, metrics)


def test_the_card_tells_the_model_the_data_the_tokens_and_the_losses():
    """Seen to catch: metrics beyond the checkpoint taken, the ledger's rows for its tokens."""
    metrics = [
        {"kind": "train", "step": 6, "loss": 2.5}, {"kind": "eval", "step": 6, "loss": 2.75, "bits_per_byte": 1.25,
         "corpora": {"code": {"loss": 2.125, "bits_per_byte": None}}},
        {"kind": "train", "step": 7, "loss": 9.0}, {"kind": "eval", "step": 7, "loss": 9.0},
    ]
    card = card_of(make_index(), metrics)
    front, _, body = card.removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(front) == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["megascale", "llama"]}
    assert f"A LlamaForCausalLM of {num_parameters(ModelConfig(**LLAMA), has_padding=False):,} parameters" in body
    assert "6 steps on 600 tokens" in body
    assert "| code | 720 | 48 | 0.5 | d1 | d3 |" in body
    assert "| training, one batch | 6 | 2.5000 |" in body
    assert "| validation | 6 | 2.7500 | 1.2500 |" in body
    assert "| validation, code | 6 | 2.1250 |  |" in body
    assert "9.0000" not in card
    assert "| learning_rate | 0.25 |" in body
    assert "- fork at step 2 of run run-b\n  - optimizer.learning_rate = 0.1 then, 0.25 now" in body


@pytest.mark.parametrize(("model", "task", "words"), [
    ({"family": "bert"}, "fill-mask", (
        "AutoModelForMaskedLM", "6 steps on 600 masked tokens", "nats per masked token", "| corpus | tokens read |",
        "it tells masked tokens.", "Token 5 pads rows")),
    ({"family": "bert", "pair_head": True}, "fill-mask", ("AutoModelForPreTraining",)),
    ({"family": "t5"}, "text2text-generation", (
        "AutoModelForSeq2SeqLM", "on 600 target tokens", "nats per target token", "The decoder begins after")),
    ({"family": "vit", "vision": {"image_size": 8, "patch_size": 4, "channels": 1}}, "image-classification", (
        "AutoModelForImageClassification", "6 steps on 600 images", "nats per image", "| corpus | bytes read |",
        "600 images with a label")),
])
def test_the_card_of_what_writes_no_text(model, task, words):
    """Units, and how it is loaded. Seen to catch: a BERT that continues text, bytes of images told as tokens."""
    card = card_of(make_index(LLAMA | model), [{"kind": "eval", "step": 6, "loss": 2.5}])
    assert f"pipeline_tag: {task}\n" in card
    for shown in words:
        assert shown in card
    assert "continues text" not in card
    assert "AutoModelForCausalLM" not in card
    assert model["family"] != "vit" or "token" not in card.partition("## Training")[0].partition("## Losses")[2]


def test_the_card_can_be_published():
    """No folder, url or password, no markup of a stranger's. Seen to catch: lineage sources as they are."""
    card = card_of(make_index())
    assert "hunter2" not in card
    assert "/home" not in card
    assert "s3://" not in card
    assert "# card\\|&lt;b>" in card


def test_without_metrics_the_card_has_the_loss_of_the_state():
    assert "| validation | 3 | 2.5000 |" in card_of(make_index(validation_loss=2.5, evaluated_step=3))
    assert "Never evaluated." in card_of(make_index())


def test_every_parameter_is_exported_once():
    config = ModelConfig(**LLAMA)
    units = plan_units(config)
    assert sum(unit.numel for unit in units) == num_parameters(config, has_padding=False)
    names = [name for unit in units for name, _ in unit.hf_tensors]
    assert len(names) == len(set(names)) == 2 * 9 + 3


def test_files_are_filled_in_order_and_a_tensor_is_never_cut():
    """Seen to catch: a file begun anew for each tensor, the space of a full file not given back."""
    units = [Unit(name, (size,), ((name, (size,)),)) for name, size in zip("abcde", (3, 4, 9, 2, 6), strict=True)]
    shards = plan_shards(units, "bfloat16", max_shard_bytes=16)
    assert [[unit.name for unit in shard.units] for shard in shards] == [["a", "b"], ["c"], ["d", "e"]]
    assert [shard.file for shard in shards][:2] == [
        "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"]
    assert [shard.data_bytes for shard in shards] == [14, 18, 16]
    (only,) = plan_shards(units, "bfloat16", max_shard_bytes=48)
    assert only.file == "model.safetensors"


@pytest.mark.parametrize(("change", "name"), [
    ({}, "LlamaForCausalLM"), ({"window": 47}, "MistralForCausalLM"), ({"window": 48}, "LlamaForCausalLM"),
    ({"bias": True}, "LlamaForCausalLM"), ({"family": "gpt2"}, "GPT2LMHeadModel"),
    ({"family": "gpt2", "window": 48}, "GPT2LMHeadModel"),
])
def test_the_class_that_computes_the_same(change, name):
    assert choose_architecture(ModelConfig(**{**LLAMA, **change})) == name


@pytest.mark.parametrize(("text", "size_bytes"), [
    ("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("1.5KB", 1500), ("2TB", 2 * 10**12)])
def test_sizes(text, size_bytes):
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["5", "GB", "0GB", "-1GB", "5GiB", "1e3MB", ""])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="such as 5GB"):
        parse_size(text)
