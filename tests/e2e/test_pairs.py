"""Models with an encoder through the command line: pairs from a table, resumed, in another layout, exported."""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForSeq2SeqLM

from megascale.checkpoint.find import peek_checkpoint
from megascale.checkpoint.run_file import peek_run_store
from megascale.config.load import parse_config
from megascale.train.generate import load_model
from tests.support.tiny_run import curve, megascale

SPANS = {"family": "t5", "activation": "geglu", "tie_embeddings": False, "dropout": 0.1}
PAIRS = {"family": "transformer"}


def write_config(folder, name: str, model: dict, steps: int = 6, **parallel) -> str:
    """The config of a run `folder/name`, saved every 3 steps."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({
        "run": {"name": "pairs", "folder": str(folder / name), "seed": 3},
        "model": {"num_layers": 1, "d_model": 32, "num_heads": 2, "vocab_size": 300, "max_seq_len": 32} | model,
        "data": {"folder": str(folder / "corpus"), "window_rows": 16, "num_lanes": 4,
                 "packing": "none" if model == PAIRS else "concat"},
        "train": {"seq_len": 32, "micro_batch_size": 2, "global_batch_tokens": 256, "max_steps": steps},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
        "precision": {"dtype": "fp32"}, "parallel": {"zero_stage": 1, **parallel},
        "evaluate": {"interval_steps": 3, "max_rows": 8}, "checkpoint": {"interval_steps": 3, "keep_last": 2},
        "observe": {"wandb": {"mode": "disabled"}},
    }))
    return str(path)


def weights(run_folder) -> dict[str, torch.Tensor]:
    """Those of a run's newest checkpoint."""
    checkpoint = peek_checkpoint(peek_run_store(run_folder), None)
    config = parse_config(checkpoint.index.run.config, source="test")
    return dict(load_model(checkpoint, config).named_parameters())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus of letters whose translation is `y` of some lines and `no` of the others, and a T5 on its spans."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = [f"{'abcd'[number % 4]}{'efgh'[number // 4 % 4]}{number}\t{'no' if number % 4 else 'y'}"
             for number in range(240)]
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n")
    built = megascale("data", "pairs", folder / "pairs.tsv", "--out", folder / "corpus", "--vocab-size", "257",
                      "--validation-fraction", "0.2")
    assert built.returncode == 0, built.stderr
    done = megascale("train", write_config(folder, "spans", SPANS), "--nproc", "1")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(("ranks", "parallel", "tolerance"), [(1, {}, 0.0), (2, {"tp": 2}, 1e-6)])
def test_resumed_in_the_same_layout_and_in_another(folder, ranks, parallel, tolerance):
    """Of spans and dropout to the bit, or within rounding.

    Seen to catch: what is drawn for a row taken from how many were read before.
    """
    name = f"resumed_{ranks}"
    done = megascale(
        "train", write_config(folder, name, SPANS, **parallel), "--nproc", ranks, "--fork", f"{folder}/spans@3"
    )
    assert done.returncode == 0, done.stderr
    straight = [line for line in curve(folder / "spans") if line[1] > 3]
    resumed = [line for line in curve(folder / name) if line[1] > 3]
    assert len(resumed) == len(straight) == 4
    for expected, found in zip(straight, resumed, strict=True):
        assert (found[:2], found[4]) == (expected[:2], expected[4])
        for one, other in zip(found[2:4], expected[2:4], strict=True):
            assert one == other or one == pytest.approx(other, rel=tolerance, abs=tolerance)


def test_exported_and_imported(folder):
    """The folder loads by the auto class, and gives the same weights back to the bit."""
    done = megascale("export", folder / "spans", "--format", "hf", "--out", folder / "hf")
    assert done.returncode == 0, done.stderr
    assert "transformers gives the checkpoint's logits" in done.stdout
    theirs = AutoModelForSeq2SeqLM.from_pretrained(folder / "hf")
    assert type(theirs).__name__ == "T5ForConditionalGeneration"
    assert theirs.generation_config.decoder_start_token_id == theirs.config.pad_token_id
    done = megascale("import", write_config(folder, "imported", SPANS), folder / "hf")
    assert done.returncode == 0, done.stderr
    before, after = weights(folder / "spans"), weights(folder / "imported")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_whole_targets_are_counted(folder):
    """Short and long targets in one batch, decoded greedily, on one rank and by two."""
    done = megascale("train", write_config(folder, "answers", PAIRS, steps=60), "--nproc", "1")
    assert done.returncode == 0, done.stderr
    found = []
    for ranks, layout in (("1", []), ("2", ["--set", "parallel.tp=2"])):
        done = megascale("eval", folder / "answers", "--nproc", ranks, "--json", *layout)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1])["validation"]["corpus"])
    assert found[0]["accuracy"] == found[1]["accuracy"] == 1
    assert found[0]["exact_match"] == found[1]["exact_match"] == 1
