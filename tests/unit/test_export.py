"""Export to transformers: the same logits, the same bytes, little memory, and nothing left of an export that failed."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from launcher.request import FRUGAL_ENVIRONMENT
from megascale.checkpoint.find import peek_checkpoint
from megascale.checkpoint.index import ProbeRecord, ProbeRow
from megascale.checkpoint.local_store import LocalStore
from megascale.config.model import ModelConfig
from megascale.errors import CheckpointError, ConfigError, DataError, MegascaleError
from megascale.export import hf_export
from megascale.export.check import check_logits, choose_tokens
from megascale.export.hf_export import cast, export_run
from megascale.export.hf_plan import plan_units
from megascale.model.families.hf_names import from_hf
from tests.support.export_run import EOS_ID, make_run, random_weights
from tests.support.ranks import REPOSITORY
from tests.support.tiny_run import command_environment

SMALL = {"num_layers": 2, "d_model": 64, "num_heads": 4, "vocab_size": 100, "max_seq_len": 48}
MODELS = {
    "gpt2": {"family": "gpt2", **SMALL},
    "gpt2_untied_without_bias": {"family": "gpt2", "tie_embeddings": False, "bias": False, "d_ff": 96, **SMALL},
    "llama": {"family": "llama", **SMALL},
    "llama_gqa_tied": {
        "family": "llama", "num_kv_heads": 2, "tie_embeddings": True, "rope_theta": 5e5, "norm_eps": 1e-3, **SMALL},
    "llama_mqa_bias": {"family": "llama", "num_kv_heads": 1, "bias": True, "d_ff": 80, **SMALL},
    "mistral": {"family": "llama", "num_kv_heads": 2, "window": 7, **SMALL},
    "t5": {"family": "t5", **SMALL},
    "t5_gated": {"family": "t5", "activation": "geglu", "tie_embeddings": False, "num_decoder_layers": 1, **SMALL},
}
GB = 10**9
SHARD_BYTES = 50_000


@pytest.fixture(params=MODELS, scope="module")
def exported(request, tmp_path_factory):
    """A run of each kind and its export in fp32, over several files and by small chunks. Not to be changed."""
    folder, config = tmp_path_factory.mktemp(request.param) / "run", ModelConfig(**MODELS[request.param])
    weights = make_run(folder, MODELS[request.param])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_export, "CHUNK_BYTES", 1000)
        patch.setattr(hf_export, "READ_BYTES", 5000)
        return folder, config, weights, export_run(folder, None, None, "float32", SHARD_BYTES)


def load_tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_transformers_computes_the_same(exported):
    """Seen to catch: `rope_theta` left out, `rms_norm_eps` left out, `sliding_window` one more, GELU without tanh."""
    folder, _, _, done = exported
    assert check_logits(folder, done.step, done.folder, "float32") < 1e-5


def test_the_weights_are_those_of_the_checkpoint_to_the_bit(exported):
    """Seen to catch: chunks cast to bf16 on the way, chunks of twice the rows that they move on by."""
    _, config, weights, done = exported
    tensors = load_tensors(done.folder)
    back = from_hf(config, weights, tensors)
    assert all(torch.equal(back[name].view(torch.int32), weights[name].view(torch.int32)) for name in weights)
    if config.family == "gpt2" and not config.has_bias:
        zeros = [name for name in tensors if name.endswith(".bias")]
        assert len(zeros) == 6 * config.num_layers + 1
        assert not any(tensors[name].any() for name in zeros)


def test_files_are_no_larger_than_asked_and_the_index_names_them(exported):
    _, _, _, done = exported
    sizes = {path.name: path.stat().st_size for path in done.folder.glob("*.safetensors")}
    assert sorted(sizes) == [shard.file for shard in done.shards]
    assert len(sizes) > 3
    assert all(shard.data_bytes <= SHARD_BYTES or len(shard.units) == 1 for shard in done.shards)
    assert all(sizes[shard.file] == len(shard.header) + shard.data_bytes for shard in done.shards)
    index = json.loads((done.folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(shard.data_bytes for shard in done.shards)
    for name, file in index["weight_map"].items():
        assert name in load_file(done.folder / file)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral"])
def test_the_folder_loads_by_the_auto_classes(kind, tmp_path):
    make_run(tmp_path, MODELS[kind])
    done = export_run(tmp_path, None, tmp_path / "out", "float32", 5 * GB)
    assert [path.name for path in done.folder.glob("*.safetensors*")] == ["model.safetensors"]
    tokenizer = AutoTokenizer.from_pretrained(done.folder)
    ids = tokenizer("w5 w7 w9", add_special_tokens=False)["input_ids"]
    assert ids == [5, 7, 9]
    assert tokenizer.decode([5, 7]) == "w5 w7"
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (EOS_ID, EOS_ID)
    assert len(tokenizer) == SMALL["vocab_size"]
    model = AutoModelForCausalLM.from_pretrained(done.folder)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == EOS_ID
    drawn = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)
    assert drawn.shape[1] <= 7


@pytest.mark.parametrize("kind", ["gpt2", "llama_gqa_tied"])
def test_weights_of_transformers_come_back_to_the_byte(kind, tmp_path):
    """Theirs into a checkpoint and out again. Seen to catch: queries and keys swapped in `split_qkv`."""
    make_run(tmp_path / "first", MODELS[kind])
    first = export_run(tmp_path / "first", None, None, "float32", 5 * GB)
    config = ModelConfig(**MODELS[kind])
    torch.manual_seed(5)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(first.folder))
    theirs.save_pretrained(tmp_path / "theirs")
    state = load_tensors(tmp_path / "theirs")
    weights = from_hf(config, [unit.name for unit in plan_units(config)], state)
    make_run(tmp_path / "second", MODELS[kind], weights=weights)
    again = load_tensors(export_run(tmp_path / "second", None, None, "float32", 5 * GB).folder)
    assert again.keys() == state.keys()
    assert all(again[name].numpy().tobytes() == state[name].numpy().tobytes() for name in state)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_rounds_once_and_is_checked_as_rounded(dtype, tmp_path):
    """Seen to catch: the check comparing with unrounded weights."""
    weights = make_run(tmp_path, MODELS["llama"])
    done = export_run(tmp_path, None, None, dtype, 5 * GB)
    stored = load_tensors(done.folder)["model.norm.weight"]
    assert torch.equal(stored, weights["final_norm.weight"].to(getattr(torch, dtype)))
    assert json.loads((done.folder / "config.json").read_text())["torch_dtype"] == dtype
    assert check_logits(tmp_path, done.step, done.folder, dtype) < 1e-5


def test_a_value_that_float16_cannot_hold_is_refused():
    cast(torch.tensor([65504.0, float("inf")]), torch.float16, "x")
    with pytest.raises(CheckpointError, match=r"x has a value of 7e\+04.*--dtype float32"):
        cast(torch.tensor([1.0, 7e4]), torch.float16, "x")


def test_one_changed_weight_is_found_by_the_check(tmp_path):
    """Seen to catch: a check that compares a model with itself, and one that lets NaN pass."""
    make_run(tmp_path, MODELS["gpt2"])
    done = export_run(tmp_path, None, None, "float32", 5 * GB)
    path = done.folder / "model.safetensors"
    whole = path.read_bytes()
    for value in (b"\x00\x00\x80\x3f", b"\x00\x00\xc0\x7f"):
        path.write_bytes(whole[:-4] + value)
        with pytest.raises(MegascaleError, match=r"differ from the checkpoint's.*Nothing was removed") as caught:
            check_logits(tmp_path, done.step, done.folder, "float32")
        assert caught.value.exit_code == 3
    assert path.exists()


def test_a_tensor_that_transformers_lacks_fails_the_check(tmp_path):
    make_run(tmp_path, MODELS["llama"])
    done = export_run(tmp_path, None, None, "float32", 5 * GB)
    path = done.folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"model.norm.weight"', b'"model.norm.wight" ', 1))
    with pytest.raises(MegascaleError, match=r"model\.norm\.wight"):
        check_logits(tmp_path, done.step, done.folder, "float32")


def test_the_check_takes_the_probe_unless_its_rows_are_within_the_window(tmp_path):
    probe = ProbeRecord((ProbeRow(tuple(range(12)), (12,), ()),), 1.0, 11, "fp32")
    make_run(tmp_path, MODELS["mistral"], probe=probe)
    index = peek_checkpoint(LocalStore(tmp_path)).index
    assert choose_tokens(index, ModelConfig(**MODELS["mistral"])).tolist() == [list(range(12))]
    wide = ModelConfig(**MODELS["mistral"] | {"window": 12})
    assert choose_tokens(index, wide).shape == (2, 48)


def test_memory_stays_under_twice_the_largest_tensor(tmp_path):
    """All tensors are in one file here, so this is less than the file. Seen to catch: all tensors of a file read before
    the first is written, tensors read without `READ_BYTES`."""
    large = {"family": "llama", "num_layers": 1, "d_model": 1024, "num_heads": 2, "d_ff": 64,
             "vocab_size": 8000, "max_seq_len": 16}
    make_run(tmp_path / "small", {**large, "vocab_size": 64, "d_model": 32})
    make_run(tmp_path / "large", large)
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.export_memory", tmp_path / "small", tmp_path / "large"],
        cwd=REPOSITORY, env=command_environment(DS_ACCELERATOR="cpu", **FRUGAL_ENVIRONMENT), check=True,
        capture_output=True, text=True,
    )
    largest = 8000 * 1024 * 4
    assert largest < int(done.stdout) < 2 * largest


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    """Seen to catch: the temporary folder left behind; written under its own name."""
    make_run(tmp_path, MODELS["llama"])
    calls = []

    def fail_at_the_end(*arguments):
        calls.append(sorted(path.name for path in (tmp_path / "export").iterdir()))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_export, "sync_folder", fail_at_the_end)
    with pytest.raises(OSError, match="No space"):
        export_run(tmp_path, None, None, "float32", 5 * GB)
    assert calls[0][0].startswith("hf_step_00000003.tmp-")
    assert list((tmp_path / "export").iterdir()) == []


def test_bits_that_change_while_they_are_read_are_found(tmp_path, monkeypatch):
    """The files were verified by hash; what is in memory is compared again. Seen to catch: no digest taken."""
    make_run(tmp_path, MODELS["llama"])
    fill = hf_export.fill_pieces

    def fill_with_a_flip(checkpoint, pieces):
        fill(checkpoint, pieces)
        pieces[0].tensor[0] += 1e-7

    monkeypatch.setattr(hf_export, "fill_pieces", fill_with_a_flip)
    with pytest.raises(CheckpointError, match="isn't what was saved"):
        export_run(tmp_path, None, None, "float32", 5 * GB)


@pytest.mark.parametrize(("kind", "is_written"), [("llama", True), ("t5", True), ("bert", False)])
def test_only_what_writes_text_says_how(kind, is_written, tmp_path):
    """Seen to catch: the file written whatever the family."""
    make_run(tmp_path, (MODELS | {"bert": {"family": "bert", **SMALL}})[kind])
    done = export_run(tmp_path, None, None, "float32", 5 * GB)
    assert (done.folder / "generation_config.json").exists() == is_written


def test_what_is_there_is_not_overwritten(tmp_path):
    make_run(tmp_path, MODELS["llama"])
    out = tmp_path / "out"
    out.mkdir()
    export_run(tmp_path, None, out, "float32", 5 * GB)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(CheckpointError, match=r"isn't an empty folder; remove it, or choose another with --out"):
        export_run(tmp_path, None, out, "bfloat16", 5 * GB)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_too_full_a_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    make_run(tmp_path, MODELS["llama"])
    monkeypatch.setattr(hf_export, "free_bytes", lambda folder: 1000)
    with pytest.raises(CheckpointError, match=r"has 1000 left.*--dtype"):
        export_run(tmp_path, None, tmp_path / "out", "float32", 5 * GB)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("change", "words"), [
    ({"family": "gpt2", "window": 8}, "model.window = 8 of family gpt2"),
    ({"family": "llama", "window": 8, "bias": True}, "MistralForCausalLM has windows but no biases"),
])
def test_what_transformers_cannot_express_is_refused_by_name(change, words, tmp_path):
    make_run(tmp_path, {**SMALL, **change})
    with pytest.raises(ConfigError, match=words):
        export_run(tmp_path, None, None, "float32", 5 * GB)
    assert not (tmp_path / "export").exists()


def test_a_run_that_lacks_something_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is no run folder"):
        export_run(tmp_path, None, None, "float32", 5 * GB)
    make_run(tmp_path, MODELS["llama"])
    with pytest.raises(CheckpointError, match="no whole checkpoint of step 7; steps 3 are there"):
        export_run(tmp_path, 7, None, "float32", 5 * GB)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json: missing"):
        export_run(tmp_path, None, None, "float32", 5 * GB)
    file = next((tmp_path / "checkpoints").rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match="damaged"):
        export_run(tmp_path, None, None, "float32", 5 * GB)


def test_weights_of_another_shape_than_the_config_are_refused(tmp_path):
    weights = random_weights(ModelConfig(**MODELS["llama"]))
    make_run(tmp_path, MODELS["llama"], weights={name: weights[name] for name in weights if "blocks.1" not in name})
    with pytest.raises(CheckpointError, match=r"blocks\.1\..* has shape none: it is missing"):
        export_run(tmp_path, None, None, "float32", 5 * GB)
