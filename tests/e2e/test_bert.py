"""BERT through the command line: trained from text, resumed to the bit, taken up by another layout, exported."""

import json

import pytest
import yaml

from tests.support.corpus import make_text
from tests.support.tiny_run import curve, megascale

SPECIAL = [word for token in ("[CLS]", "[SEP]", "[MASK]") for word in ("--special-token", token)]


def write_config(folder, name: str, **parallel) -> str:
    """The config of a run `folder/name` of 6 steps, saved every 3."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({
        "run": {"name": "bert", "folder": str(folder / name), "seed": 3},
        "model": {"family": "bert", "num_layers": 2, "d_model": 32, "num_heads": 2, "vocab_size": 300,
                  "max_seq_len": 32, "norm_eps": 1e-12, "pair_head": True, "dropout": 0.1},
        "data": {"folder": str(folder / "corpus"), "window_rows": 16, "num_lanes": 4,
                 "objective": {"pair_task": "nsp", "whole_word": True}},
        "train": {"seq_len": 32, "micro_batch_size": 2, "global_batch_tokens": 256, "max_steps": 6},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2},
        "precision": {"dtype": "fp32"}, "parallel": {"zero_stage": 1, **parallel},
        "evaluate": {"interval_steps": 3, "max_rows": 8}, "checkpoint": {"interval_steps": 3, "keep_last": 2},
        "observe": {"wandb": {"mode": "disabled"}},
    }))
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    make_text(folder / "text")
    built = megascale("data", "build", folder / "text", "--out", folder / "corpus", "--vocab-size", "300",
                      "--validation-fraction", "0.2", *SPECIAL)
    assert built.returncode == 0, built.stderr
    done = megascale("train", write_config(folder, "run"), "--nproc", "1")
    assert done.returncode == 0, done.stderr
    return folder


def test_training_says_no_bits_per_byte(trained):
    """Its loss is that of some tokens among all others, so it measures no compression."""
    evals = [line for line in (trained / "run/metrics.jsonl").read_text().splitlines() if '"kind": "eval"' in line]
    assert json.loads(evals[-1])["bits_per_byte"] is None


@pytest.mark.parametrize(("ranks", "parallel", "tolerance"), [(1, {}, 0.0), (2, {"tp": 2}, 1e-6)])
def test_resumed_in_the_same_layout_and_in_another(trained, tmp_path, ranks, parallel, tolerance):
    """To the bit, or within rounding. Seen to catch: what is drawn for a row taken from how many were read before."""
    name = f"resumed_{ranks}"
    done = megascale("train", write_config(trained, name, **parallel), "--nproc", ranks, "--fork", f"{trained}/run@3")
    assert done.returncode == 0, done.stderr
    straight = [line for line in curve(trained / "run") if line[1] > 3]
    resumed = [line for line in curve(trained / name) if line[1] > 3]
    assert len(resumed) == len(straight) == 4
    for expected, found in zip(straight, resumed, strict=True):
        assert found[:2] == expected[:2]
        assert found[2] == pytest.approx(expected[2], rel=tolerance, abs=tolerance)
        assert (found[3] is None) == (expected[3] is None)
        assert found[3] is None or found[3] == pytest.approx(expected[3], rel=tolerance, abs=tolerance)
        assert found[4] == expected[4]


def test_exported_and_begun_again(trained):
    done = megascale("export", trained / "run", "--format", "hf", "--out", trained / "hf")
    assert done.returncode == 0, done.stderr
    assert "transformers gives the checkpoint's logits" in done.stdout
    named = json.loads((trained / "hf/tokenizer_config.json").read_text())
    assert named["mask_token"] == "[MASK]"
    done = megascale("import", write_config(trained, "imported"), trained / "hf")
    assert done.returncode == 0, done.stderr
    again = megascale("train", trained / "imported.yaml", "--nproc", "1", "train.max_steps=1",
                      "optimizer.warmup_steps=0")
    assert again.returncode == 0, again.stderr


def test_a_corpus_without_the_mask_is_refused(trained):
    done = megascale("train", write_config(trained, "other"), "--nproc", "1", "data.objective.mask_token=<mask>")
    assert done.returncode == 2
    assert "build the corpus with --special-token '<mask>'" in done.stderr
