"""ViT through the command line: trained from image shards, resumed to the bit, told how good it is, taken up again."""

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.support.tiny_run import curve, megascale

NUM_IMAGES = 60


def write_config(folder, name: str) -> str:
    """The config of a run `folder/name` of 6 steps, saved every 3, with all that is drawn at random."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({
        "run": {"name": "vit", "folder": str(folder / name), "seed": 3},
        "model": {"family": "vit", "num_layers": 2, "d_model": 32, "num_heads": 2, "vocab_size": 3, "max_seq_len": 4,
                  "dropout": 0.1, "vision": {"image_size": 8, "patch_size": 4, "channels": 1}},
        "data": {"folder": str(folder / "corpus"), "packing": "none", "window_rows": 16, "num_lanes": 4,
                 "objective": {"crop_min_fraction": 0.5, "flips": True}},
        "train": {"seq_len": 4, "micro_batch_size": 4, "global_batch_tokens": 32, "max_steps": 6},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2},
        "precision": {"dtype": "fp32"}, "parallel": {"zero_stage": 1},
        "evaluate": {"interval_steps": 3}, "checkpoint": {"interval_steps": 3, "keep_last": 2},
        "observe": {"wandb": {"mode": "disabled"}, "log_interval_steps": 1},
    }))
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    for number in range(NUM_IMAGES):
        path = folder / "images" / f"class_{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 12), np.uint8)).save(path)
    built = megascale("data", "images", folder / "images", "--out", folder / "corpus", "--validation-fraction", "0.3")
    assert built.returncode == 0, built.stderr
    done = megascale("train", write_config(folder, "run"), "--nproc", "1", timeout_s=300)
    assert done.returncode == 0, done.stderr
    return folder


def test_resumed_to_the_bit(trained):
    """Crops, mirrors and dropout are those of the row and step.

    Seen to catch: what is drawn for a row taken from how many were read before.
    """
    done = megascale(
        "train", write_config(trained, "resumed"), "--nproc", "1", "--fork", f"{trained}/run@3", timeout_s=300
    )
    assert done.returncode == 0, done.stderr
    straight = [line for line in curve(trained / "run") if line[1] > 3]
    assert len(straight) == 4
    assert [line for line in curve(trained / "resumed") if line[1] > 3] == straight


def test_top_1_of_a_run_and_of_what_was_exported_and_imported(trained):
    told = megascale("eval", trained / "run", timeout_s=300)
    assert told.returncode == 0, told.stderr
    score = told.stdout.splitlines()[-1]
    assert "top-1" in score
    assert "top-5" not in score  # of three classes
    assert "perplexity" not in score
    done = megascale("export", trained / "run", "--format", "hf", "--out", trained / "hf", timeout_s=300)
    assert done.returncode == 0, done.stderr
    assert "transformers gives the checkpoint's logits" in done.stdout
    assert not (trained / "hf/generation_config.json").exists()
    assert "bytes read" in (trained / "hf/README.md").read_text()
    done = megascale("import", write_config(trained, "imported"), trained / "hf", timeout_s=300)
    assert done.returncode == 0, done.stderr
    assert "tokenizer" not in done.stderr  # images have none
    again = megascale("eval", trained / "imported", timeout_s=300)
    assert again.stdout.splitlines()[-1] == score
