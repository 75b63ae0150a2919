"""`megascale data index`: the index made again from the shards is the one that was lost."""

import hashlib
import json
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from data_tools.cli import app
from data_tools.index import rebuild_index
from data_tools.verify import verify_corpus
from megascale.data.manifest import load_manifest
from megascale.errors import DataError
from tests.support.corpus import QUIET, make_corpus, make_text_corpus
from tests.support.ranks import REPOSITORY

SPLITS = ("train", "validation")


def index_files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.glob("*/*") if path.suffix != ".tar"}


@pytest.mark.parametrize("lost", [("shards.npy",), ("index.json",), ("shards.npy", "index.json")])
def test_the_lost_index_of_a_text_corpus_comes_back_to_the_byte(tmp_path, lost):
    """Bytes of text are worked out by decoding. Caught mutations: decoding with the end-of-text tokens; characters in
    place of bytes; another end of a member."""
    folder = make_text_corpus(tmp_path / "corpus")
    before = index_files(folder)
    for split in SPLITS:
        for name in lost:
            (folder / split / name).unlink()
    rebuild_index(folder, QUIET)
    assert index_files(folder) == before
    assert len(verify_corpus(folder, QUIET)) == 2


def test_text_beyond_ascii_is_counted_in_bytes(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(20):
        (text / f"{number}.txt").write_text("naïve — 数据 \U0001f600 " * (number + 1))
    options = ["--vocab-size", "300", "--validation-fraction", "0.2", "--workers", "1"]
    made = CliRunner().invoke(app, ["build", str(text), "--out", str(tmp_path / "corpus"), *options])
    assert made.exit_code == 0, made.output
    before = load_manifest(str(tmp_path / "corpus"), "train")
    (tmp_path / "corpus/train/index.json").unlink()
    assert rebuild_index(tmp_path / "corpus", QUIET)[0].text_bytes == before.text_bytes


def test_a_corpus_of_format_1_becomes_one_of_format_2(tmp_path):
    folder = make_corpus(tmp_path / "corpus")
    before = index_files(folder)
    for split in SPLITS:
        manifest = load_manifest(str(folder), split)
        index = json.loads((folder / split / "index.json").read_text())
        kept = ("split", "dtype", "vocab_size", "eos_id", "text_bytes", "tokenizer_file", "tokenizer_sha256")
        shards = [
            {"name": shard.name, **{key: value for key, value in shard._asdict().items() if key != "number"}}
            for shard in map(manifest.shard, range(manifest.num_shards))
        ]
        old = {"format_version": 1, **{key: index[key] for key in kept}, "shards": shards}
        (folder / split / "index.json").write_text(json.dumps(old))
        (folder / split / "shards.npy").unlink()
    with pytest.raises(DataError, match=r"no index of format 2 .*megascale data index"):
        load_manifest(str(folder), "train")
    rebuild_index(folder, QUIET)
    assert index_files(folder) == before


def test_damaged_shards_are_refused_by_name_and_nothing_is_written(tmp_path):
    """Caught mutations: a block's checksum not compared with the shard's own; the first damaged shard ends it."""
    folder = make_corpus(tmp_path / "corpus")
    before = index_files(folder)
    for name, offset in (("train/shard-000000.tar", 2000), ("train/shard-000003.tar", 30)):
        content = bytearray((folder / name).read_bytes())
        content[offset] ^= 1
        (folder / name).write_bytes(content)
    with pytest.raises(DataError) as refused:
        rebuild_index(folder, QUIET)
    first, *faults = str(refused.value).splitlines()
    assert first.startswith("2 of 4 shards of")
    assert "shard-000000.tar: block 0: token_crc32 is" in faults[0]
    assert "shard-000003.tar: byte 0: the header" in faults[1]
    assert index_files(folder) == before


@pytest.mark.parametrize("has_old", [True, False])
def test_a_missing_shard_is_not_passed_over(tmp_path, has_old):
    """Known from the old table, or from a gap in the numbers. Caught mutation: taking what is there."""
    folder = make_corpus(tmp_path / "corpus")
    if not has_old:
        for split in SPLITS:
            (folder / split / "index.json").unlink()
    (folder / f"train/shard-00000{3 if has_old else 1}.tar").unlink()
    with pytest.raises(DataError, match=r"1 shards are missing, such as shard-00000[13].tar; .*--allow-missing"):
        rebuild_index(folder, QUIET)
    train, _ = rebuild_index(folder, QUIET, allow_missing=True)
    assert train.num_shards == 3
    assert len(verify_corpus(folder, QUIET)) == 2


def test_another_tokenizer_is_refused(tmp_path):
    folder = make_corpus(tmp_path / "corpus")
    path = folder / "tokenizer.json"
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_text(path.read_text().replace("w96", "w99"))
    with pytest.raises(DataError, match=rf"isn't the one that made the tokens: .*says {found[:12]}"):
        rebuild_index(folder, QUIET)


def test_parts_of_an_array_of_jobs_have_numbers_of_their_own(tmp_path):
    folder = make_corpus(tmp_path / "corpus", num_validation_documents=0)
    content = (folder / "train/shard-000003.tar").read_bytes()
    (folder / "train/shard-1000000.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"shard-1000000.tar: member 000003_000000.docs.npy where 1000000_000000.docs"):
        rebuild_index(folder, QUIET)


def test_a_folder_without_shards_is_refused(tmp_path):
    with pytest.raises(DataError, match="to index; give the folder of a corpus"):
        rebuild_index(tmp_path, QUIET)


def test_the_program_in_the_docs_reads_a_corpus(tmp_path):
    (program,) = re.findall(r"^```python\n(.*?)^```", (REPOSITORY / "docs/data_format.md").read_text(), re.M | re.S)
    split = make_corpus(tmp_path / "corpus") / "train"
    command = [sys.executable, "-c", program, str(split)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "64 documents, the first ends with token 0\n", done.stderr
