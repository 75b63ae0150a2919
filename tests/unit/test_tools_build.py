"""A build: whole or not at all, the same bytes whatever the workers, done once, and read back."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from data_tools import splits as splits_module
from data_tools.build import BuildSettings, build_corpus
from data_tools.chunks import find_duplicates
from data_tools.corpora import find_source
from data_tools.output_folder import partial_folder
from megascale.data.manifest import load_manifest
from megascale.data.shards import map_shard
from megascale.data.tokenizer import load_tokenizer
from megascale.errors import DataError
from tests.support.corpus import QUIET, make_text

SETTINGS = BuildSettings(vocab_size=300, validation_fraction=0.2, shard_tokens=2000, block_tokens=500)

@pytest.fixture
def text(tmp_path):
    return make_text(tmp_path / "text")


def build(text, out, workers=1, **options):
    settings = replace(SETTINGS, **options.pop("settings", {}))
    return build_corpus(find_source(str(text)), out, settings, workers, QUIET, **options)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def documents(folder, split):
    """The texts of a split, decoded."""
    manifest = load_manifest(folder, split)
    tokenizer = load_tokenizer(manifest.tokenizer_place)
    texts = []
    for number, info in enumerate(map(manifest.shard, range(manifest.num_shards))):
        shard = map_shard(manifest, number)
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
    assert summary.splits[0].num_shards > 2
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


def test_workers_chunks_and_engines_do_not_change_a_byte(text, tmp_path, monkeypatch):
    build(text, tmp_path / "one", allow_fast=False)
    monkeypatch.setattr("data_tools.chunks.MIN_CHUNK_BYTES", 3000)
    summary = build(text, tmp_path / "two", workers=2)
    assert "tokenized by tiktoken, its ids equal on " in summary.describe()
    assert files(tmp_path / "one") == files(tmp_path / "two")
    monkeypatch.setattr("data_tools.tokenize.BATCH_BYTES", 100)
    build(text, tmp_path / "small-batches")
    assert files(tmp_path / "one") == files(tmp_path / "small-batches")


def test_exact_copies_are_dropped_on_request(text, tmp_path, monkeypatch):
    """The first one stays; caught mutation: `is_duplicate[order[:-1][is_equal]]`, which keeps the last one."""
    build(text, tmp_path / "once")
    for path in list(text.iterdir())[::2]:
        (text / f"copy-{path.name}").write_bytes(path.read_bytes())
    monkeypatch.setattr("data_tools.chunks.MIN_CHUNK_BYTES", 3000)
    summary = build(text, tmp_path / "out", settings={"deduplicate": True})
    assert "dropped 20 exact copies of other documents" in summary.describe()
    for split in ("train", "validation"):
        assert sorted(documents(tmp_path / "out", split)) == sorted(documents(tmp_path / "once", split))
    table = np.array([[1, 2], [1, 3], [0, 9], [1, 2], [1, 2], [0, 9]], np.uint64)
    assert find_duplicates(table).tolist() == [False, False, False, True, True, True]
    assert find_duplicates(table[:0]).tolist() == []


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


def test_a_full_disk_costs_no_finished_work(text, tmp_path, monkeypatch):
    """Caught mutation: the partial folder always removed; the tokens would be made again."""
    build(text, tmp_path / "clean")

    def full_disk(*arguments, **facts):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(splits_module, "write_index", full_disk)
        with pytest.raises(DataError, match=r"out can't be written \(\[Errno 28\] No space .* goes on where this one"):
            build(text, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("data_tools.tokenize.tokenize_chunk", None)
    assert build(text, tmp_path / "out").is_new
    assert files(tmp_path / "out") == files(tmp_path / "clean")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clean", "out", "text"]


@pytest.mark.parametrize("change", ["source", "settings"])
def test_what_was_begun_for_another_corpus_is_not_used(text, tmp_path, monkeypatch, change):
    """Caught mutation: `resume_or_clear` without the comparison."""
    with monkeypatch.context() as patch:
        patch.setattr(splits_module, "write_index", None)
        with pytest.raises(TypeError):
            build(text, tmp_path / "out")
    if change == "source":
        (text / "new.txt").write_text("more text")
    options = {"validation_fraction": 0.3} if change == "settings" else {}
    console = Console(record=True, file=io.StringIO(), width=1000)
    settings = replace(SETTINGS, **options)
    build_corpus(find_source(str(text)), tmp_path / "out", settings, 1, console)
    assert "starting over: " in console.export_text()
    build(text, tmp_path / "clean", settings=options)
    assert files(tmp_path / "out") == files(tmp_path / "clean")


def test_an_error_before_any_chunk_leaves_nothing(tmp_path):
    (tmp_path / "text.jsonl").write_text("no JSON")
    with pytest.raises(DataError, match=r"text.jsonl line 1 isn't JSON"):
        build(tmp_path / "text.jsonl", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]


def test_a_bad_line_is_found_by_any_worker(text, tmp_path, monkeypatch):
    monkeypatch.setattr("data_tools.chunks.MIN_CHUNK_BYTES", 3000)
    build(text, tmp_path / "good")
    (text / "020b.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    with pytest.raises(DataError, match=r"020b.jsonl line 2 holds a int where text is expected"):
        build(text, tmp_path / "out", workers=2, tokenizer_path=tmp_path / "good" / "tokenizer.json")


def test_two_builds_of_one_folder(tmp_path):
    with partial_folder(tmp_path / "out", "*"):
        with pytest.raises(DataError, match=r"another build of .*out is running; wait for it or choose another --out"):
            with partial_folder(tmp_path / "out", "*"):
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
        ({"special_tokens": ("<a>", "<a>")}, r"--special-token: .* holds an empty token or one twice"),
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
    with pytest.raises(DataError, match=r"tokenizer.json has no special token <a>; it has <\|endoftext\|>: name one"):
        build(text, tmp_path / "fourth", tokenizer_path=path, settings={"special_tokens": ("<a>",)})


def test_special_tokens_are_trained_and_no_text_becomes_one(text, tmp_path):
    (text / "spelt.txt").write_text("a<|fim_prefix|>b")
    build(text, tmp_path / "out", settings={"special_tokens": ("<|fim_prefix|>",), "validation_fraction": 0.0})
    manifest = load_manifest(tmp_path / "out", "train")
    assert load_tokenizer(manifest.tokenizer_place).token_to_id("<|fim_prefix|>") == 1
    shards = [map_shard(manifest, number) for number in range(manifest.num_shards)]
    tokens = np.concatenate([shard.block_tokens(block) for shard in shards for block in range(len(shard.table))])
    assert not (tokens == 1).any()
    assert "a<|fim_prefix|>b" in documents(tmp_path / "out", "train")
