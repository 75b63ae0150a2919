"""`megascale import` by the command line: from a Hugging Face folder to training in any layout, and back."""

import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megascale.config.derive import derive
from megascale.config.load import load_config
from megascale.data.stream import open_stream
from megascale.model.families.hf_names import to_hf
from megascale.model.transformer import build_model
from tests.support.hf_folder import build_hf_model, save_hf_model, write_import_config
from tests.support.tiny_run import curve, megascale, read_metrics


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus):
    """A Hugging Face folder: a LLaMA with grouped queries, in 4 files. Not to be changed."""
    folder = tmp_path_factory.mktemp("hf") / "llama"
    return save_hf_model(build_hf_model("llama"), folder, corpus, max_shard_size="30KB")


@pytest.fixture(scope="module")
def imported(folder, corpus):
    """The config of a run that was begun with that folder, by its own advice. Not to be changed."""
    shown = megascale("import", "--show", folder)
    assert shown.returncode == 0, shown.stderr
    section = yaml.safe_load(shown.stdout)["model"] | {"vocab_multiple": 48}
    config_path = write_import_config(folder.parent / "run.yaml", folder.parent / "run", corpus, section)
    done = megascale("import", config_path, folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "imported 21,664 parameters" in done.stdout
    return config_path


def first_loss(run_folder):
    return next(line["loss"] for line in read_metrics(run_folder) if line["kind"] == "train")


def test_training_begins_with_the_weights_in_any_layout(imported, folder, tmp_path):
    """The first loss is transformers' own on the same rows, on two replicas under ZeRO-1 and on two tp ranks.

    Mutation caught: keys and values exchanged in `fuse_qkv`.
    """
    losses = []
    for name, layout in {"dp2": ["parallel.zero_stage=1"], "tp2": ["parallel.tp=2", "parallel.zero_stage=0"]}.items():
        shutil.copytree(imported.parent / "run", tmp_path / name)
        done = megascale("train", imported, "--nproc", "2", f"run.folder={tmp_path / name}", *layout)
        assert done.returncode == 0, done.stderr
        assert "step_00000000 at step 0" in done.stdout
        losses.append(first_loss(tmp_path / name))

    config = load_config(imported)
    stream = open_stream(config, derive(config, 1))
    rows = stream.objective.assemble(stream.read(range(8)).rows, stream.keys_of(range(8)))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits_BTV = theirs(torch.from_numpy(rows.tokens_BT)).logits
    expected = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), torch.from_numpy(rows.labels_BT).flatten())
    assert losses == pytest.approx([expected.item()] * 2, abs=1e-5)


def test_export_gives_the_same_bytes_back(imported, folder, tmp_path):
    """Of every tensor, padding of the vocabulary and fused layers notwithstanding."""
    done = megascale("export", imported.parent / "run", "--format", "hf", "--no-check", "--out", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    before, after = ({name: tensor for file in sorted(place.glob("*.safetensors"))
                      for name, tensor in load_file(file).items()} for place in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert tensor.numpy().tobytes() == after[name].numpy().tobytes(), name


@pytest.mark.slow
def test_a_run_imported_with_its_own_first_weights_is_the_run(imported, tmp_path):
    """To the bit, in fp16: moments, optimizer step, loss scale and data stream are those of a new run.

    The weights are rounded to fp16 first, as the masters of a new run are.

    Mutations caught: an optimizer step of 1, half the first loss scale.
    """
    settings = ["precision.dtype=fp16", "model.dropout=0.1", "parallel.zero_stage=1"]
    config = load_config(imported, settings)
    weights = to_hf(config.model, dict(build_model(config.model, config.run.seed).named_parameters()))
    shutil.copytree(imported.parent / "llama", tmp_path / "hf", ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file({name: tensor.detach().half().contiguous() for name, tensor in weights.items()},
              tmp_path / "hf" / "model.safetensors")
    curves = []
    for name in ("new", "imported"):
        here = [*settings, f"run.folder={tmp_path / name}"]
        if name == "imported":
            assert megascale("import", imported, tmp_path / "hf", *here).returncode == 0
        done = megascale("train", imported, "--nproc", "1", *here)
        assert done.returncode == 0, done.stderr
        scales = [line.get("loss_scale") for line in read_metrics(tmp_path / name)]
        curves.append([*curve(tmp_path / name), *scales])
    assert curves[0] == curves[1]


@pytest.mark.parametrize(("arguments", "said"), {
    "nothing": ([], "needs a CONFIG and a SOURCE"),
    "no_source": (["CONFIG", "nowhere"], "nowhere: neither a Hugging Face folder"),
    "other_model": (["CONFIG", "HF", "model.num_layers=3"], "model.num_layers = 3 here, num_hidden_layers = 2 there"),
    "has_run": (["CONFIG", "HF"], "holds a run with checkpoints (0); set it aside with --fresh"),
}.values())
def test_a_users_mistake_is_one_message(imported, folder, arguments, said):
    places = {"CONFIG": str(imported), "HF": str(folder)}
    done = megascale("import", *(places.get(argument, argument) for argument in arguments))
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
