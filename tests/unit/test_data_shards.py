"""The corpus on disk: what is read is what was written, and every fault has one message that names it."""

import json

import numpy as np
import pytest

from megascale.data.manifest import check_corpus, load_manifest
from megascale.data.rows import CorpusRows, open_rows
from megascale.data.shards import Shard, ShardStore
from megascale.errors import DataError
from tests.support.corpus import make_corpus, synthetic_documents


@pytest.fixture
def folder(tmp_path):
    return make_corpus(tmp_path / "corpus")


def read_all(folder):
    """Every token of the training split, through the rows."""
    rows = CorpusRows(load_manifest(folder, "train"), seq_len=30)
    return [rows.read(shard, row) for shard, count in enumerate(rows.rows_per_shard) for row in range(count)]


def flip(path, offset):
    """Flips one bit of a file."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 4
    path.write_bytes(content)


def block_entry(folder, shard, block):
    """The row of a block in the block table."""
    return Shard(load_manifest(folder, "train"), shard).table[block]


def test_shards_hold_the_documents(folder):
    manifest = load_manifest(folder, "train")
    documents = list(synthetic_documents(64, 97, 0))
    store = ShardStore(manifest, max_open=2)
    read = np.concatenate([store.open(n).read(0, info.tokens) for n, info in enumerate(manifest.shards)])
    assert len(manifest.shards) == 4
    assert read.tolist() == np.concatenate(documents).tolist()
    assert manifest.num_tokens == len(read)
    assert manifest.num_documents == 64
    ends = [store.open(n).document_ends(b) for n, info in enumerate(manifest.shards) for b in range(info.blocks)]
    assert np.concatenate([np.diff(e, prepend=0) for e in ends]).tolist() == [len(d) for d in documents]


def test_any_range_of_a_shard_can_be_read(folder):
    """Ranges within a block are views of the file, others cross blocks."""
    shard = Shard(load_manifest(folder, "train"), 0)
    whole = shard.read(0, sum(entry.tokens for entry in shard.table)).copy()
    random = np.random.default_rng(0)
    for start, length in zip(random.integers(0, len(whole) - 1, 200), random.integers(1, 700, 200), strict=True):
        stop = min(start + length, len(whole))
        assert shard.read(start, stop).tolist() == whole[start:stop].tolist()
    view = shard.read(3, 9)
    assert not view.flags.owndata
    assert not view.flags.writeable


def test_uint32_vocabulary(tmp_path):
    folder = make_corpus(tmp_path / "corpus", vocab_size=70_000)
    manifest = load_manifest(folder, "train")
    assert manifest.dtype == "uint32"
    assert ShardStore(manifest).open(0).read(0, 2000).max() > 65_536


def test_fingerprint_names_the_content(folder, tmp_path):
    same, other = make_corpus(tmp_path / "same"), make_corpus(tmp_path / "other", seed=1)
    fingerprint = load_manifest(folder, "train").fingerprint
    assert load_manifest(same, "train").fingerprint == fingerprint
    assert load_manifest(other, "train").fingerprint != fingerprint
    assert load_manifest(folder, "validation").fingerprint != fingerprint


def test_missing_corpus(tmp_path):
    with pytest.raises(DataError, match=r"no corpus at .*none: no such folder; make one with: megascale data build"):
        load_manifest(tmp_path / "none", "train")


def test_missing_split(folder):
    with pytest.raises(DataError, match=r"no finished split 'test' .*splits found: train, validation"):
        load_manifest(folder, "test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-20], "can't be read"),
        (lambda text: "[]", "can't be read"),
        (lambda text: text.replace('"blocks"', '"bloks"', 1), "shards.0.blocks: Field required"),
        (lambda text: text.replace('"format_version": 1', '"format_version": 2'), "format_version: Input should be 1"),
        (lambda text: text.replace('"name": "', '"name": "../', 1), "shards.0.name: String should match"),
    ],
)
def test_damaged_index(folder, change, message):
    path = folder / "train" / "index.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=message):
        load_manifest(folder, "train")


def test_vocabulary_larger_than_the_model(folder):
    with pytest.raises(DataError, match=r"has 97 token ids, model.vocab_size = 96 is smaller; set .* to 97 or more"):
        open_rows(folder, "train", 16, vocab_size=96)
    assert open_rows(folder, "train", 16, vocab_size=97).num_rows > 400


def test_missing_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer .*tokenizer.json is missing"):
        check_corpus(load_manifest(folder, "train"), 97)


def test_changed_tokenizer(folder):
    flip(folder / "tokenizer.json", 100)
    with pytest.raises(DataError, match=r"isn't the one that made the tokens: sha256"):
        check_corpus(load_manifest(folder, "train"), 97)


def test_missing_shard(folder):
    (folder / "train" / "shard-000002.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000002.tar can't be opened .*index.json lists 4 shards"):
        check_corpus(load_manifest(folder, "train"), 97)


def test_shard_cut_short(folder):
    path = folder / "train" / "shard-000001.tar"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 512)
    with pytest.raises(DataError, match=rf"has {size - 512} bytes, .*index.json says {size}: it was cut short"):
        check_corpus(load_manifest(folder, "train"), 97)
    with pytest.raises(DataError, match="cut short"):
        read_all(folder)


def test_flipped_bit_in_tokens(folder):
    """Caught mutation: no check on first touch."""
    path = folder / "train" / "shard-000001.tar"
    flip(path, block_entry(folder, 1, 2).token_offset + 10)
    check_corpus(load_manifest(folder, "train"), 97)
    with pytest.raises(
        DataError, match=r"shard-000001.tar: block 2: crc32 of the tokens is .*, expected .*index.json.*verify"
    ):
        read_all(folder)


def test_flipped_bit_in_document_ends(folder):
    path = folder / "train" / "shard-000000.tar"
    flip(path, block_entry(folder, 0, 1).document_offset)
    with pytest.raises(DataError, match=r"shard-000000.tar: block 1: crc32 of the document ends is"):
        Shard(load_manifest(folder, "train"), 0).document_ends(1)


def test_flipped_bit_in_block_table(folder):
    info = load_manifest(folder, "train").shards[3]
    flip(folder / "train" / "shard-000003.tar", info.index_offset + info.index_bytes - 1)
    with pytest.raises(DataError, match=r"shard-000003.tar: crc32 of member __index__ is"):
        read_all(folder)


def test_index_of_another_corpus(folder, tmp_path):
    """An index whose counts don't fit the shard is refused even where size and checksum agree."""
    path = folder / "train" / "index.json"
    record = json.loads(path.read_text())
    record["shards"][0]["tokens"] += 1
    path.write_text(json.dumps(record))
    with pytest.raises(
        DataError, match=r"member __index__ counts \(blocks, tokens, documents\) = \(\d+, \d+, \d+\), expected"
    ):
        read_all(folder)


def test_token_id_out_of_range(folder):
    path = folder / "train" / "index.json"
    path.write_text(path.read_text().replace('"vocab_size": 97', '"vocab_size": 50'))
    with pytest.raises(DataError, match=r"shard-000000.tar: block 0 holds token id \d+, vocab_size = 50"):
        read_all(folder)


def test_split_without_rows(tmp_path):
    folder = make_corpus(tmp_path / "corpus")
    path = folder / "train" / "index.json"
    record = json.loads(path.read_text())
    record["shards"] = [{**record["shards"][0], "tokens": 1}]
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"has 1 tokens in 1 shards: no row of two tokens"):
        open_rows(folder, "train", 16, 97)
