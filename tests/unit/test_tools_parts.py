"""Job arrays: parts of any number hold the source once, and a merge that stops anywhere is finished by the next."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from data_tools import merge as merge_module
from data_tools.build import build_corpus
from data_tools.corpora import find_source
from data_tools.merge import merge_parts
from data_tools.parts import Part, parse_part
from data_tools.settings import BuildSettings
from data_tools.verify import verify_corpus
from megascale.data.manifest import load_manifest
from megascale.errors import DataError
from tests.support.corpus import QUIET, make_text
from tests.unit.test_tools_build import documents, files

SETTINGS = BuildSettings(vocab_size=300, validation_fraction=0.2, shard_tokens=2000, block_tokens=500)
COUNT = 3


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setattr("data_tools.chunks.MIN_CHUNK_BYTES", 3000)
    folder = make_text(tmp_path / "text")
    (folder / "empty.txt").write_text("\n")
    build_corpus(find_source(str(folder)), tmp_path / "whole", SETTINGS, 1, QUIET)
    return folder


def build_part(text, out, index, count=COUNT, settings=SETTINGS):
    tokenizer = out.parent / "whole" / "tokenizer.json"
    return build_corpus(find_source(str(text)), out, settings, 1, QUIET, tokenizer, part=Part(index, count))


@pytest.mark.parametrize("deduplicate", [False, True])
def test_parts_hold_the_source_once(text, tmp_path, deduplicate):
    """Caught mutations: chunks of `number % count != index` kept; the first shard of all parts numbered 0."""
    if deduplicate:
        for path in list(text.glob("0*.txt"))[::2]:
            (text / f"copy-{path.name}").write_bytes(path.read_bytes())
    settings, out = replace(SETTINGS, deduplicate=deduplicate), tmp_path / "out"
    for index in (2, 0, 1):
        assert build_part(text, out, index, settings=settings).is_new
    assert not build_part(text, out, 1, settings=settings).is_new
    summary = merge_parts(out)
    assert "dropped 1 empty documents" in summary.describe()
    assert ("dropped 20 exact copies" in summary.describe()) == deduplicate
    whole = load_manifest(tmp_path / "whole", "train")
    for split in ("train", "validation"):
        assert sorted(documents(out, split)) == sorted(documents(tmp_path / "whole", split))
    merged = load_manifest(out, "train")
    assert (merged.num_tokens, merged.text_bytes) == (whole.num_tokens, whole.text_bytes)
    numbers = merged.table["number"]
    assert (np.diff(numbers) > 0).all()
    assert set(numbers // 1_000_000) == {0, 1, 2}
    assert sorted(path.name for path in out.iterdir()) == ["build.json", "tokenizer.json", "train", "validation"]
    verify_corpus(out, QUIET)
    assert build_part(text, out, 1, settings=settings).splits[0].num_shards == merged.num_shards, "found merged"


@pytest.fixture
def parts(text, tmp_path):
    for index in range(COUNT):
        build_part(text, tmp_path / "out", index)
    return tmp_path / "out"


class Stopped(BaseException):
    """Stands for a kill: no handler of ours may catch it."""


@pytest.mark.parametrize("call", ["rename", "write_file", "fsync_folder", "rmtree"])
def test_a_merge_that_stops_anywhere_is_finished_by_the_next(parts, tmp_path, monkeypatch, call):
    """Stops before each such call in turn; caught mutations: shards not looked for where they go to; `build.json`
    written first."""
    shutil.copytree(parts, tmp_path / "clean")
    merge_parts(tmp_path / "clean")
    owner = {"rename": merge_module.Path, "rmtree": merge_module.shutil}.get(call, merge_module)
    original = getattr(owner, call)
    stop_at, num_stops, is_done = 0, 0, False
    while not is_done:
        calls = iter(range(1000))

        def stopping(*arguments, calls=calls, stop_at=stop_at, **options):
            if next(calls) == stop_at:
                raise Stopped
            return original(*arguments, **options)

        folder = tmp_path / f"out-{stop_at}"
        shutil.copytree(parts, folder)
        with monkeypatch.context() as patch:
            patch.setattr(owner, call, stopping)
            try:
                merge_parts(folder)
                is_done = True
            except Stopped:
                num_stops += 1
        merge_parts(folder)
        assert files(folder) == files(tmp_path / "clean")
        stop_at += 1
    assert num_stops >= {"rename": 8, "write_file": 2, "fsync_folder": 2, "rmtree": 1}[call]


def test_an_unfinished_part(parts):
    shutil.rmtree(parts / ".parts" / "part-00001-of-00003")
    message = r"can't be merged: of 3 parts, 1 aren't finished \(part-00001-of-00003\); make them with --array i/3"
    with pytest.raises(DataError, match=message):
        merge_parts(parts)


def test_parts_of_two_arrays(text, parts):
    with pytest.raises(DataError, match=r"holds parts of an array of another size \(part-00000-of-00003\), asked is"):
        build_part(text, parts, 0, count=4)


def test_parts_of_two_recipes(text, parts):
    folder = parts / ".parts" / "part-00001-of-00003"
    record = json.loads((folder / "build.json").read_text())
    record["recipe"]["seed"] = 7
    (folder / "build.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"part-00001-of-00003 was made by another recipe .*seed = 7 there, 0 asked"):
        merge_parts(parts)
    with pytest.raises(DataError, match=r"part-00001-of-00003 holds another corpus \(seed = 7 there, 0 asked\)"):
        build_part(text, parts, 1)


def test_missing_and_cut_shard(parts):
    shard = parts / ".parts" / "part-00001-of-00003" / "train" / "shard-1000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"shard .*-1000000.tar is of \d+ bytes, its part's table says \d+ bytes"):
        merge_parts(parts)
    shard.unlink()
    with pytest.raises(DataError, match=r"shard .*-1000000.tar is missing, its part's table says .*make that part"):
        merge_parts(parts)


def test_more_parts_than_chunks(tmp_path, text):
    for index in range(30):
        summary = build_part(text, tmp_path / "out", index, count=30)
    assert "no document fell to this part" in summary.describe()
    assert merge_parts(tmp_path / "out").splits[0].num_documents > 0


def test_nothing_to_merge(tmp_path):
    with pytest.raises(DataError, match=r"holds no parts .*megascale data tokenize SOURCE .* --array i/n"):
        merge_parts(tmp_path)


@pytest.mark.parametrize("text", ["3/3", "-1/3", "3", "a/b", "0/0", "1/2/3", "", "0/9999999"])
def test_no_part(text):
    with pytest.raises(DataError, match=r"is neither i/n with i from 0 to n - 1, such as 0/32, nor the word slurm"):
        parse_part(text)


def slurm(**numbers):
    return {f"SLURM_ARRAY_TASK_{name.upper()}": str(number) for name, number in numbers.items()}


def test_part_of_a_job_array():
    assert parse_part("2/3") == Part(2, 3)
    assert parse_part("slurm", slurm(id=5, min=0, max=31, count=32)) == Part(5, 32)
    with pytest.raises(DataError, match=r"needs a job array \(SLURM_ARRAY_TASK_ID isn't set\); submit with: sbatch"):
        parse_part("slurm", {})
    for numbers in ({"id": 5, "min": 5, "max": 5, "count": 1}, {"id": 3, "min": 0, "max": 7, "count": 2}):
        with pytest.raises(DataError, match=r"parts are counted from 0 without gaps; .*a single part again as --array"):
            parse_part("slurm", slurm(**numbers))
