"""The probe of a checkpoint: whoever loads it finds the loss that it was saved with, or doesn't train.

Mutation seen to be caught: the saved loss summed over the replicas without dividing by their number.
"""

import hashlib
import json
import re
import shutil

import pytest

from megascale.checkpoint.find import peek_checkpoint, read_stored_index
from megascale.checkpoint.local_store import LocalStore
from tests.support.corpus import make_corpus
from tests.support.faulty_run import faulty_run
from tests.support.tiny_run import megascale, write_config

BF16 = "precision.dtype=bf16"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A bf16 run of six steps on two replicas; its folder."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_config(folder, make_corpus(folder / "corpus", vocab_size=64))
    done = megascale("train", config, BF16, "train.max_steps=6", "optimizer.horizon_steps=12", "--nproc", "2")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def resumed(trained, tmp_path):
    """A copy to resume: the arguments of `megascale train`."""
    shutil.copytree(trained / "run", tmp_path / "run")
    config = write_config(tmp_path, trained / "corpus")
    return [config, BF16, "train.max_steps=7", "optimizer.horizon_steps=12"]


def test_the_loss_is_found_in_another_layout(resumed, tmp_path):
    probe = peek_checkpoint(LocalStore(tmp_path / "run")).index.probe
    assert (len(probe.rows), probe.num_tokens, probe.dtype) == (2, 64, "bf16")
    done = megascale("train", *resumed, "parallel.tp=2", "train.micro_batch_size=1", "--nproc", "2")
    assert done.returncode == 0, done.stderr
    found, apart = re.search(r"probe loss ([\d.]+), as saved to within ([\d.e+-]+)", done.stdout).groups()
    assert float(found) == pytest.approx(probe.loss, rel=2**-6)
    assert 0 < float(apart) < 0.01


def test_weights_that_were_not_refreshed_are_found_out(resumed, tmp_path):
    """Every tensor of the state is right, but the model computes with others."""
    with faulty_run("stale_rank", tmp_path / "fault", {}, "--nproc", "2", *resumed) as run:
        assert run.end() == 2
        assert "its probe batch had a loss of" in run.text()
        assert "step 7/7" not in run.text()


def test_another_loss_is_refused_before_the_first_step(resumed, tmp_path):
    store = LocalStore(tmp_path / "run")
    path = store.path(6) / "index.json"
    values = json.loads(path.read_text())
    values["probe"]["loss"] += 0.2
    text = (json.dumps(values) + "\n").encode()
    path.write_bytes(text)
    sums = store.path(6) / "SHA256SUMS"
    sums.write_text(re.sub(r"\w{64}(?=  index.json)", hashlib.sha256(text).hexdigest(), sums.read_text()))
    assert read_stored_index(store, 6).probe.loss == values["probe"]["loss"]
    done = megascale("train", *resumed, "--nproc", "2")
    assert done.returncode == 2
    assert re.search(r"its probe batch had a loss of [\d.]+ \(bf16\) when it was saved and has [\d.]+ \(bf16\) now",
                     done.stderr)
    assert "step 7/7" not in done.stdout
    done = megascale("train", *resumed, "checkpoint.probe=false", "--nproc", "2")
    assert done.returncode == 0, done.stderr
    assert peek_checkpoint(store).index.probe is None
