"""Import without the command line: configs of strangers, their files, and what the new run then holds."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megascale.checkpoint.find import peek_checkpoint
from megascale.checkpoint.run_file import peek_run_store
from megascale.config.load import load_config
from megascale.config.model import ModelConfig
from megascale.errors import CheckpointError, ConfigError, DataError, SaveError
from megascale.export import import_run
from megascale.export.hf_folder import open_folder
from megascale.export.hf_import import differences, model_section, section_of
from megascale.export.import_run import compare_vocabularies, divide, import_weights
from megascale.export.weight_source import open_source
from megascale.model.families.hf_names import to_hf
from megascale.train.generate import load_model
from tests.support.corpus import make_corpus
from tests.support.hf_folder import GPT2_SHAPE, LLAMA_SHAPE, build_hf_model, save_hf_model, write_import_config

GPT2 = {"model_type": "gpt2"} | GPT2_SHAPE
LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5} | LLAMA_SHAPE
MISTRAL = LLAMA | {"model_type": "mistral"}
KINDS = {
    "gpt2": ("gpt2", {}, None),
    "gpt2_untied": ("gpt2", {"tie_word_embeddings": False, "n_inner": 80}, None),
    "llama": ("llama", {"rms_norm_eps": 1e-5}, None),
    "llama_tied_bias": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True,
                                  "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, None),
    "llama_bf16": ("llama", {}, torch.bfloat16),
    "mistral_window": ("mistral", {"sliding_window": 7}, None),
    "llama_3.1": ("llama", {"head_dim": 12, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 16,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0}}, None),
    "llama_yarn": ("llama", {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}}, None),
    "qwen3_windows": ("qwen3", {"head_dim": 12, "sliding_window": 7, "use_sliding_window": True,
                                "layer_types": ["sliding_attention", "full_attention"]}, None),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("import") / "corpus", vocab_size=64)


def import_folder(config_path, source, *overrides, **options):
    import_weights(config_path, list(overrides), str(source),
                   **{"is_fresh": False, "allows_other_tokenizer": False} | options)


def prepare(tmp_path, corpus, kind="llama", dtype=None, **settings):
    """An HF folder and a config that fits it."""
    model = build_hf_model(kind, **settings)
    folder = save_hf_model(model.to(dtype) if dtype else model, tmp_path / "hf", corpus)
    section = open_source(str(folder)).section | {"vocab_multiple": 48}
    return model, folder, write_import_config(tmp_path / "run.yaml", tmp_path / "run", corpus, section)


@pytest.mark.parametrize(("kind", "settings", "dtype"), KINDS.values(), ids=KINDS.keys())
def test_imported_model_computes_what_transformers_computes(tmp_path, corpus, kind, settings, dtype):
    """To 1e-5, from an untouched `save_pretrained` folder, and back to the same bits; the moments are zero.

    Mutations caught: queries and keys exchanged in `fuse_qkv`; `rope_theta`, the stretching of positions or the window
    left out of the section;
    moments of ones.
    """
    _, folder, config_path = prepare(tmp_path, corpus, kind, dtype, **settings)
    import_folder(config_path, folder)

    checkpoint = peek_checkpoint(peek_run_store(tmp_path / "run"))
    config = load_config(config_path)
    ours = load_model(checkpoint, config)
    tokens_BT = torch.randint(0, 64, (3, 32), generator=torch.Generator().manual_seed(3))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits_BTV, expected_BTV = ours(tokens_BT), theirs(tokens_BT).logits
    assert ours.config.padded_vocab_size == 96
    torch.testing.assert_close(logits_BTV[..., :64], expected_BTV, rtol=0, atol=1e-5)

    stored = load_file(tmp_path / "hf" / "model.safetensors")
    back = to_hf(config.model, dict(ours.named_parameters()))
    assert back.keys() == stored.keys()
    assert all(torch.equal(back[name].to(tensor.dtype), tensor) for name, tensor in stored.items())

    index = checkpoint.index
    assert index.state.step == index.state.rows == index.state.tokens == 0
    assert [(turn.kind, turn.run_id, turn.source) for turn in index.run.lineage] == [
        ("import", None, str(tmp_path / "hf"))
    ]
    assert all(record.digest == "0" * 16 for key, record in index.tensors.items() if not key.startswith("master/"))
    assert all(f"{kind}/{name}" in index.tensors for name, _ in ours.named_parameters()
               for kind in ("master", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize(("config", "refused"), {
    "family": ({"model_type": "opt"}, "model_type is 'opt'"),
    "rope": (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling"),
    "rope_llama3": (LLAMA | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}},
                    "lacks factor, low_freq_factor, high_freq_factor"),
    "rope_yarn": (LLAMA | {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}}, "mscale = 0.7"),
    "windows": (LLAMA | {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 7,
                         "layer_types": ["full_attention", "sliding_attention"]}, "layer_types = "),
    "partial_rotary": (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "attention_bias": (LLAMA | {"attention_bias": True}, "attention_bias = True and mlp_bias = False"),
    "mlp_bias": (LLAMA | {"mlp_bias": True}, "mlp_bias = True"),
    "activation": (LLAMA | {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    "pretraining_tp": (LLAMA | {"pretraining_tp": 2}, "pretraining_tp = 2"),
    "quantized": (LLAMA | {"quantization_config": {"bits": 4}}, "quantization_config"),
    "gpt2_activation": (GPT2 | {"activation_function": "relu"}, "activation_function = 'relu'"),
    "gpt2_scale": (GPT2 | {"scale_attn_weights": False}, "scale_attn_weights = False"),
    "gpt2_layer_scale": (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
    "missing": ({"model_type": "gpt2"}, "lacks n_layer, n_embd, n_head, vocab_size, n_positions"),
    "no_count": (LLAMA | {"num_hidden_layers": "2"}, "num_hidden_layers = '2'"),
}.values())
def test_what_our_model_does_not_compute_is_refused_by_name(config, refused):
    with pytest.raises(ConfigError) as error:
        model_section(config, "hf/config.json")
    assert refused in str(error.value)


@pytest.mark.parametrize("config", [
    GPT2, GPT2 | {"n_inner": 100, "tie_word_embeddings": False}, LLAMA,
    LLAMA | {"rope_theta": 5e5, "rope_scaling": None}, MISTRAL, MISTRAL | {"sliding_window": None},
    LLAMA | {"attention_bias": True, "mlp_bias": True}, LLAMA | {"model_type": "qwen3"},
    LLAMA | {"head_dim": 16, "rope_scaling": {"type": "linear", "factor": 2.0}},
])
def test_a_section_is_that_of_the_model_it_makes(config):
    section = model_section(config, "hf")
    assert section_of(ModelConfig(**section)) == section
    assert differences(section, ModelConfig(**section), {}) == []


def test_fields_left_out_have_the_values_of_their_classes():
    """As transformers fills them in: another default there would be another model here."""
    for kind, shape in (("gpt2", GPT2_SHAPE), *((kind, LLAMA_SHAPE) for kind in ("llama", "mistral", "qwen3"))):
        full = build_hf_model(kind).config.to_dict()
        assert model_section({"model_type": kind} | shape, "short") == model_section(full, "full")


def test_each_difference_is_named_with_the_value_to_set(tmp_path, corpus):
    _, _, config_path = prepare(tmp_path, corpus)
    with pytest.raises(ConfigError) as error:
        import_folder(config_path, tmp_path / "hf", "model.num_layers=3", "model.norm_eps=1e-5", "model.d_ff=64",
                      "model.max_seq_len=64", "model.dropout=0.1")
    lines = str(error.value).splitlines()
    assert lines[1:4] == [
        "  model.num_layers = 3 here, num_hidden_layers = 2 there; set model.num_layers=2",
        "  model.d_ff = 64 here, intermediate_size = 48 there; set model.d_ff=48",
        "  model.norm_eps = 1e-05 here, rms_norm_eps = 1e-06 there; set model.norm_eps=1e-06",
    ]
    assert "import --show" in lines[4]
    assert len(lines) == 5
    assert not (tmp_path / "run").exists()


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")


NORM = "model.norm.weight"
DAMAGE = {
    "missing": (lambda t: {name: x for name, x in t.items() if name != NORM}, f"lacks {NORM} of shape [32]"),
    "unexpected": (lambda t: t | {"score.weight": torch.ones(2)}, "has score.weight, which this model doesn't have"),
    "shape": (lambda t: t | {NORM: torch.ones(33)}, f"{NORM} has shape [33], not [32]"),
    "dtype": (lambda t: t | {NORM: torch.ones(32, dtype=torch.float64)}, f"{NORM} is F64"),
    "nan": (lambda t: t | {NORM: torch.full((32,), float("nan"))}, f"{NORM} has NaN or infinite values"),
}


@pytest.mark.parametrize(("change", "refused"), DAMAGE.values(), ids=DAMAGE.keys())
def test_weights_that_are_not_the_models_leave_no_run(tmp_path, corpus, change, refused):
    """Neither a checkpoint nor a run.json with which training would begin from weights of its own.

    Mutations caught: `run.json` kept after a failure, the draft not abandoned, unexpected tensors let pass, tensors
    not looked at for NaN.
    """
    _, folder, config_path = prepare(tmp_path, corpus)
    change_tensors(folder, change)
    with pytest.raises(DataError) as error:
        import_folder(config_path, folder)
    assert refused in str(error.value)
    assert not (tmp_path / "run" / "run.json").exists()
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_damaged_files_and_pickles_are_refused(tmp_path, corpus):
    _, folder, config_path = prepare(tmp_path, corpus)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    with pytest.raises(DataError, match="can't be read as safetensors"):
        import_folder(config_path, folder)
    weights.unlink()
    with pytest.raises(DataError, match=r"has neither model\.safetensors nor"):
        import_folder(config_path, folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"pytorch_model\.bin, a pickle.*save_pretrained"):
        import_folder(config_path, folder)
    (folder / "config.json").write_text("[")
    with pytest.raises(ConfigError, match="not JSON"):
        import_folder(config_path, folder)
    with pytest.raises(DataError, match="neither a Hugging Face folder"):
        import_folder(config_path, tmp_path / "nowhere")


@pytest.mark.parametrize("files", [{"a": "../model.safetensors"}, {"a": 3}, {"a": []}, {}, None])
def test_an_index_that_leads_elsewhere_is_refused(tmp_path, corpus, files):
    _, folder, _ = prepare(tmp_path, corpus)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(DataError, match="doesn't name files of this folder"):
        open_folder(folder)


def test_shards_of_a_folder_are_read_together(tmp_path, corpus):
    model, folder, _ = prepare(tmp_path, corpus)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="10KB")
    found = open_folder(folder)
    assert len({stored.file for stored in found.tensors.values()}) > 2
    assert all(torch.equal(found.read(name), tensor) for name, tensor in model.state_dict().items())


def test_names_of_the_first_gpt2_files(tmp_path, corpus):
    """GPT-2 as its authors' files were converted: no prefix, masks stored, links to the blobs of a cache."""
    _, folder, _ = prepare(tmp_path, corpus, "gpt2")
    expected = {name: open_folder(folder).read(name) for name in open_folder(folder).tensors}
    change_tensors(folder, lambda tensors: {name.removeprefix("transformer."): x for name, x in tensors.items()} | {
        "h.0.attn.bias": torch.ones(1, 1, 32, 32), "h.1.attn.masked_bias": torch.tensor(-1e4),
    })
    for name in ("model.safetensors", "config.json"):
        shutil.move(folder / name, tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
    found = open_folder(folder)
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(found.read(name), tensor) for name, tensor in expected.items())


def test_a_tied_head_that_differs_is_refused(tmp_path, corpus):
    """Mutation caught: the two left uncompared."""
    _, folder, config_path = prepare(tmp_path, corpus, "gpt2")
    embedding = load_file(folder / "model.safetensors")["transformer.wte.weight"]
    change_tensors(folder, lambda tensors: tensors | {"lm_head.weight": embedding + 1})
    with pytest.raises(DataError, match="ties the head to the embedding"):
        import_folder(config_path, folder)
    change_tensors(folder, lambda tensors: tensors | {"lm_head.weight": embedding.clone()})
    import_folder(config_path, folder)


def test_another_tokenizer_is_refused(tmp_path, corpus, capsys):
    """Mutation caught: ids compared without their texts."""
    _, folder, config_path = prepare(tmp_path, corpus)
    tokenizer = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(tokenizer.replace('"w7"', '"seven"').replace('"w9"', '"nine"'))
    with pytest.raises(DataError) as error:
        import_folder(config_path, folder)
    assert "2 of 64 ids differ; 7 is 'w7' in the corpora, 'seven' there" in str(error.value)
    assert f"megascale data tokenize SOURCE --tokenizer {folder}/tokenizer.json" in str(error.value)
    import_folder(config_path, folder, allows_other_tokenizer=True)
    assert "warning: the corpora were tokenized with another tokenizer" in capsys.readouterr().out
    (folder / "tokenizer.json").unlink()
    import_folder(config_path, folder, is_fresh=True)
    assert "has no tokenizer.json" in capsys.readouterr().out


def test_vocabularies_compare_by_id():
    assert compare_vocabularies({0: "a", 1: "b"}, {1: "b", 0: "a"}) is None
    assert compare_vocabularies({0: "a"}, {0: "a", 1: "b"}).startswith("1 of 2 ids differ; 1 is None")


def test_a_folder_with_checkpoints_is_left_alone(tmp_path, corpus):
    """Mutation caught: checkpoints that are there not looked for."""
    _, folder, config_path = prepare(tmp_path, corpus)
    import_folder(config_path, folder)
    run_id = json.loads((tmp_path / "run" / "run.json").read_text())["run_id"]
    with pytest.raises(CheckpointError, match=r"holds a run with checkpoints .*--fresh"):
        import_folder(config_path, folder)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["run_id"] == run_id
    import_folder(config_path, folder, is_fresh=True)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["run_id"] != run_id
    assert (tmp_path / "run" / "set_aside" / "1" / "checkpoints" / "step_00000000").is_dir()


def test_weights_of_another_run(tmp_path, corpus):
    """Its master weights to the bit, its history with this turn; never those of the folder that is to be set aside."""
    _, folder, config_path = prepare(tmp_path, corpus)
    import_folder(config_path, folder)
    first = peek_checkpoint(peek_run_store(tmp_path / "run"))
    import_folder(config_path, f"{tmp_path / 'run'}@0", f"run.folder={tmp_path / 'second'}", "train.max_steps=5")
    second = peek_checkpoint(peek_run_store(tmp_path / "second"))
    digests = [{key: record.digest for key, record in found.index.tensors.items()} for found in (first, second)]
    assert digests[0] == digests[1]
    assert [(turn.kind, turn.run_id) for turn in second.index.run.lineage] == [
        ("import", None), ("import", first.index.run.run_id)
    ]
    with pytest.raises(ConfigError, match=r"run\.folder of its own"):
        import_folder(config_path, tmp_path / "run", is_fresh=True)
    with pytest.raises(ConfigError, match=r"model\.vocab_multiple = 64 here, vocab_multiple = 48 there"):
        import_folder(config_path, tmp_path / "run", f"run.folder={tmp_path / 'third'}", "model.vocab_multiple=64")
    with pytest.raises(CheckpointError, match="no whole checkpoint of step 7"):
        import_folder(config_path, f"{tmp_path / 'run'}@7", f"run.folder={tmp_path / 'third'}")


def test_a_checkpoint_of_several_files(tmp_path, corpus, monkeypatch):
    _, folder, config_path = prepare(tmp_path, corpus)
    monkeypatch.setattr(import_run, "PART_BYTES", 40_000)
    import_folder(config_path, folder)
    checkpoint = peek_checkpoint(peek_run_store(tmp_path / "run"))
    assert len(checkpoint.index.files) > 2
    assert max(record.bytes for record in checkpoint.index.files.values()) < 100_000
    load_model(checkpoint, load_config(config_path))


def test_parameters_are_divided_in_order():
    shapes = {"a": (10,), "b": (2, 2), "c": (1,), "d": (30,)}
    states = {name: dict.fromkeys(("master", "exp_avg", "exp_avg_sq"), shape) for name, shape in shapes.items()}
    assert divide(states, 120) == [["a"], ["b", "c", "d"]]
    assert divide(states, 1) == [["a"], ["b"], ["c"], ["d"]]
    assert divide(states, 1 << 30) == [["a", "b", "c", "d"]]


def test_a_full_disk_leaves_no_run(tmp_path, corpus, monkeypatch):
    _, folder, config_path = prepare(tmp_path, corpus)
    monkeypatch.setattr("megascale.checkpoint.local_store.free_bytes", lambda folder: 1000)
    with pytest.raises(SaveError, match=r"not written: the disk is too full\. It needs [1-9][0-9.]* MiB"):
        import_folder(config_path, folder)
    assert not (tmp_path / "run" / "run.json").exists()
    assert not list((tmp_path / "run").glob("checkpoints/*"))
