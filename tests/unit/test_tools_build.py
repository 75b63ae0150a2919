"""A build: whole or not at all, the same bytes whatever the workers, done once, and read back."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from data_tools import build as build_module
from data_tools.build import BuildSettings, build_corpus
from data_tools.corpora import find_source
from data_tools.output_folder import partial_folder
from megascale.data.manifest import load_manifest
from megascale.data.shards import Shard
from megascale.data.tokenizer import load_tokenizer
from megascale.errors import DataError
from tests.support.corpus import QUIET, make_text
from tests.support.ranks import REPOSITORY

SETTINGS = BuildSettings(vocab_size=300, validation_fraction=0.2, shard_tokens=2000, block_tokens=500)

SLOW_BUILD = """
import sys, time
from pathlib import Path
from data_tools import build
from tests.unit.test_tools_build import QUIET, SETTINGS, find_source

build.write_index = lambda manifest: time.sleep(60)
build.build_corpus(find_source(sys.argv[1]), Path(sys.argv[2]), SETTINGS, 1, QUIET)
"""


@pytest.fixture
def text(tmp_path):
    return make_text(tmp_path / "text")


def build(text, out, workers=1, **options):
    settings = BuildSettings(**{**SETTINGS.__dict__, **options.pop("settings", {})})
    return build_corpus(find_source(str(text)), out, settings, workers, QUIET, **options)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def documents(folder, split):
    """The texts of a split, decoded."""
    manifest = load_manifest(folder, split)
    tokenizer = load_tokenizer(manifest.tokenizer_path)
    texts = []
    for number, info in enumerate(manifest.shards):
        shard = Shard(manifest, number)
        for block in range(info.blocks):
            parts = np.split(shard.block_tokens(block), shard.document_ends(block)[:-1])
            texts += [tokenizer.decode(part[:-1].tolist()) for part in parts]
    return texts


def test_every_document_is_in_one_split_once(text, tmp_path):
    summary = build(text, tmp_path / "out")
    train, validation = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "validation")
    written = [path.read_text() for path in sorted(text.iterdir())]
    assert sorted(train + validation) == sorted(written)
    assert train != [text for text in written if text in train], "documents are shuffled"
    assert 2 <= len(validation) <= 16
    assert len(summary.splits[0].shards) > 2
    assert [split.text_bytes for split in summary.splits] == [
        sum(len(text.encode()) for text in part) for part in (train, validation)
    ]


def test_copies_of_a_text_land_on_one_side(text, tmp_path):
    for path in list(text.iterdir()):
        (text / f"copy-{path.name}").write_bytes(path.read_bytes())
    build(text, tmp_path / "out")
    train, validation = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "validation")
    assert len(train) + len(validation) == 80
    assert not set(train) & set(validation)


def test_workers_do_not_change_a_byte(text, tmp_path, monkeypatch):
    build(text, tmp_path / "one")
    build(text, tmp_path / "two", workers=2)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    monkeypatch.setattr("data_tools.tokenize.BATCH_BYTES", 100)
    build(text, tmp_path / "small-batches")
    assert files(tmp_path / "one") == files(tmp_path / "small-batches")


def test_a_finished_build_is_kept(text, tmp_path):
    out = tmp_path / "out"
    assert build(text, out).is_new
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    summary = build(text, out)
    assert not summary.is_new
    assert "nothing to do" in summary.describe()
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times


def test_another_corpus_is_replaced_on_request_only(text, tmp_path):
    out = tmp_path / "out"
    build(text, out)
    before = files(out)
    with pytest.raises(DataError, match=r"holds another corpus \(vocab_size = 300 there, 290 asked\); .*--overwrite"):
        build(text, out, settings={"vocab_size": 290})
    assert files(out) == before
    (text / "new.txt").write_text("more text")
    with pytest.raises(DataError, match=r"another corpus \(source = "):
        build(text, out)
    assert build(text, out, overwrite=True).is_new
    assert files(out) != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_other_things_is_never_replaced(text, tmp_path, overwrite):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"exists and isn't a corpus \(no build.json in it\); choose another --out"):
        build(text, out, overwrite=overwrite)
    assert files(out) == {"thesis.tex": b"years of work"}


def test_finished_build_with_a_missing_shard(text, tmp_path):
    build(text, tmp_path / "out")
    (tmp_path / "out" / "train" / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000001.tar can't be opened .*--overwrite"):
        build(text, tmp_path / "out")


def test_a_failed_build_leaves_nothing(text, tmp_path, monkeypatch):
    def full_disk(manifest):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build_module, "write_index", full_disk)
    with pytest.raises(DataError, match=r"out can't be written \(\[Errno 28\] No space left on device\)"):
        build(text, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_a_killed_build_is_cleared_by_the_next(text, tmp_path):
    """SIGKILL in the middle; caught mutation: building in the output folder itself."""
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", SLOW_BUILD, str(text), str(out)], cwd=REPOSITORY)
    partial = tmp_path / ".out.partial"
    deadline = time.monotonic() + 60
    while not list(partial.glob("train/*.tar")) and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(DataError, match=r"another build of .*out is running"):
        build(text, out)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert partial.exists()
    assert build(text, out).is_new
    assert not partial.exists()


def test_two_builds_of_one_folder(tmp_path):
    with partial_folder(tmp_path / "out"):
        with pytest.raises(DataError, match=r"another build of .*out is running; wait for it or choose another --out"):
            with partial_folder(tmp_path / "out"):
                pass


def test_unwritable_folder(text, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"corpus .*file/out can't be written"):
        build(text, tmp_path / "file" / "out")


def test_bad_and_empty_text_is_reported(text, tmp_path):
    (text / "bad.txt").write_bytes(b"\xff\xfe some text")
    (text / "empty.txt").write_text("")
    summary = build(text, tmp_path / "out")
    assert "dropped 1 empty documents" in summary.describe()
    assert "replaced bytes that aren't UTF-8 in 1 documents (bad.txt)" in summary.describe()
    assert json.loads((tmp_path / "out" / "build.json").read_text())["counts"]["bad_utf8"] == 1


def test_source_without_text(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("\n\n")
    with pytest.raises(DataError, match=r"has no document with text: 1 files hold 1 empty documents"):
        build(tmp_path / "text", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation_fraction": 1.0}, r"--validation-fraction 1.0 is not in \[0, 1\); 0.05 is usual"),
        ({"validation_fraction": 1e-9}, r"of 40 documents leaves the validation split empty; choose another fraction"),
        ({"shard_tokens": 0}, "--shard-tokens 0 is below 1"),
        ({"vocab_size": 100}, "--vocab-size 100 is too small"),
    ],
)
def test_bad_settings(text, tmp_path, settings, message):
    with pytest.raises(DataError, match=message):
        build(text, tmp_path / "out", settings=settings)


def test_no_validation_split(text, tmp_path):
    summary = build(text, tmp_path / "out", settings={"validation_fraction": 0.0})
    assert [split.split for split in summary.splits] == ["train"]
    assert summary.splits[0].num_documents == 40


def test_a_given_tokenizer_is_used(text, tmp_path):
    build(text, tmp_path / "first")
    path = tmp_path / "first" / "tokenizer.json"
    build(text, tmp_path / "second", tokenizer_path=path)
    first, second = (load_manifest(tmp_path / name, "train") for name in ("first", "second"))
    assert first.fingerprint == second.fingerprint
    with pytest.raises(DataError, match="has no token '</s>'"):
        build(text, tmp_path / "third", tokenizer_path=path, settings={"eos_token": "</s>"})
