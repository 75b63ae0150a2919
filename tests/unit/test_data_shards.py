"""The corpus on disk: what is read is what was written, and every fault has one message that names it."""

import hashlib
import io
import json
import zlib

import numpy as np
import pytest

from megascale.data.manifest import (
    BlockEntry,
    check_shard_files,
    check_vocabulary,
    load_manifest,
    read_tokenizer,
    table_bytes,
    table_of,
)
from megascale.data.shards import Shard, map_shard
from megascale.errors import DataError
from tests.support.corpus import make_corpus, synthetic_documents


@pytest.fixture
def folder(tmp_path):
    return make_corpus(tmp_path / "corpus")


def open_shards(folder):
    manifest = load_manifest(folder, "train")
    return [map_shard(manifest, position) for position in range(manifest.num_shards)]


def read_all(folder):
    """Every token and document end of the training split."""
    for shard in open_shards(folder):
        shard.read(0, sum(entry.tokens for entry in shard.table))
        shard.all_ends()


def shard_path(folder, position):
    return folder / "train" / f"shard-{position:06d}.tar"


def flip(path, offset):
    """Flips one bit of a file."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 4
    path.write_bytes(content)


def overwrite(path, offset, new):
    content = bytearray(path.read_bytes())
    content[offset : offset + len(new)] = new
    path.write_bytes(content)


def change_index(folder, **changes):
    path = folder / "train" / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_table(folder, position, **changes):
    """Writes another row of the table of shards, and an index that agrees with it."""
    manifest = load_manifest(folder, "train")
    infos = [manifest.shard(number) for number in range(manifest.num_shards)]
    infos[position] = infos[position]._replace(**changes)
    content = table_bytes(table_of(infos))
    (folder / "train" / "shards.npy").write_bytes(content)
    change_index(
        folder,
        table_sha256=hashlib.sha256(content).hexdigest(),
        num_tokens=sum(info.tokens for info in infos),
        num_documents=sum(info.documents for info in infos),
    )


def change_block_table(folder, position, content):
    """Writes another block table into a shard, and a table of shards that vouches for it."""
    info = load_manifest(folder, "train").shard(position)
    overwrite(shard_path(folder, position), info.index_offset, content)
    change_table(folder, position, index_bytes=len(content), index_crc32=zlib.crc32(content))


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def block_table(folder, position):
    return np.array(map_shard(load_manifest(folder, "train"), position).table, "<u8")


def test_shards_hold_the_documents(folder):
    manifest, documents = load_manifest(folder, "train"), list(synthetic_documents(64, 97, 0))
    shards = open_shards(folder)
    read = np.concatenate([shard.read(0, manifest.shard(n).tokens) for n, shard in enumerate(shards)])
    assert manifest.num_shards == 4
    assert read.tolist() == np.concatenate(documents).tolist()
    assert manifest.num_tokens == len(read)
    assert manifest.num_documents == 64
    lengths = [np.diff(shard.all_ends(), prepend=0) for shard in shards]
    assert np.concatenate(lengths).tolist() == [len(document) for document in documents]


def test_any_range_of_a_shard_can_be_read(folder):
    """Ranges within a block are views of the file, others cross blocks."""
    shard = open_shards(folder)[0]
    whole, ends = shard.read(0, sum(entry.tokens for entry in shard.table)).copy(), shard.all_ends()
    random = np.random.default_rng(0)
    for start, length in zip(random.integers(0, len(whole) - 1, 300), random.integers(1, 1500, 300), strict=True):
        stop = min(int(start + length), len(whole))
        assert shard.read(int(start), stop).tolist() == whole[start:stop].tolist()
        assert shard.ends_between(int(start), stop) == ends[(ends > start) & (ends < stop)].tolist()
    view = shard.read(3, 9)
    assert not view.flags.owndata
    assert not view.flags.writeable


def test_ranges_that_begin_and_end_with_blocks_and_documents(folder):
    """Caught mutations: either bound of `ends_between` counted in."""
    shard = open_shards(folder)[0]
    ends = shard.all_ends().tolist()
    for low, start in enumerate([0, *ends[:-1]]):
        for high, stop in enumerate(ends[low:], low):
            assert shard.ends_between(start, stop) == ends[low:high]
            assert shard.ends_between(start, stop - 1) == ends[low:high]
            assert shard.ends_between(max(0, start - 1), stop) == ([start] if start else []) + ends[low:high]


def test_the_place_of_a_token(folder):
    """Caught mutation: the document before at a document's first token."""
    shard = open_shards(folder)[0]
    expected = [
        (block, document)
        for block, entry in enumerate(shard.table)
        for document, length in enumerate(np.diff(shard.document_ends(block), prepend=0))
        for _ in range(length)
    ]
    assert [shard.document_of(token) for token in range(len(expected))] == expected
    assert [shard.block_of(token) for token in range(len(expected))] == [block for block, _ in expected]


def test_reading_a_row_checks_its_blocks_only(folder):
    """Caught mutation: `ends_between` by way of `all_ends`."""
    entry = open_shards(folder)[0].table[2]
    flip(shard_path(folder, 0), entry.document_offset)
    flip(shard_path(folder, 0), entry.token_offset)
    shard = open_shards(folder)[0]
    assert len(shard.read(10, 50)) == 40
    shard.ends_between(10, 500)


def test_uint32_vocabulary(tmp_path):
    folder = make_corpus(tmp_path / "corpus", vocab_size=70_000)
    assert load_manifest(folder, "train").token_dtype == np.uint32
    assert open_shards(folder)[0].read(0, 2000).max() > 65_536


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
        (lambda text: "[]", "Input should be a valid dictionary"),
        (lambda text: "[" * 100_000, "can't be read"),
        (lambda text: text.replace('"num_shards"', '"num_shard"', 1), "num_shards: Field required"),
        (lambda text: text.replace('"format_version": 2', '"format_version": 3'), "format_version: Input should be 2"),
        (lambda text: text.replace('"tokenizer.json"', '"../tokenizer.json"'), "tokenizer_file: String should match"),
        (lambda text: text.replace('"dtype": "uint16"', '"dtype": "object"'),
         "dtype: Input should be 'uint8', 'uint16' or"),
    ],
)
def test_damaged_index(folder, change, message):
    path = folder / "train" / "index.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=message):
        load_manifest(folder, "train")


def test_damaged_table_of_shards(folder):
    flip(folder / "train" / "shards.npy", 200)
    with pytest.raises(DataError, match=r"shards.npy isn't the table that .*index.json was written with: sha256"):
        load_manifest(folder, "train")


def test_vocabulary_larger_than_the_model(folder):
    with pytest.raises(DataError, match=r"has 97 token ids, model.vocab_size = 96 is smaller; set .* to 97 or more"):
        check_vocabulary(load_manifest(folder, "train"), 96)
    check_vocabulary(load_manifest(folder, "train"), 97)


def test_missing_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer .*tokenizer.json is missing"):
        read_tokenizer(load_manifest(folder, "train"))


def test_changed_tokenizer(folder):
    flip(folder / "tokenizer.json", 100)
    with pytest.raises(DataError, match=r"isn't the one that made the tokens: sha256"):
        read_tokenizer(load_manifest(folder, "train"))


def test_missing_shard(folder):
    shard_path(folder, 2).unlink()
    with pytest.raises(DataError, match=r"shard-000002.tar can't be opened .*index.json lists 4 shards"):
        check_shard_files(load_manifest(folder, "train"))


@pytest.mark.parametrize(
    ("keep", "word"), [(0, "cut short"), (512, "cut short"), (-512, "cut short"), (None, "changed")]
)
def test_shard_of_another_size(folder, keep, word):
    """Cut to nothing, within and at a member's edge, and grown."""
    content = shard_path(folder, 1).read_bytes()
    shard_path(folder, 1).write_bytes(content[:keep] if keep is not None else content + bytes(512))
    message = rf"shard-000001.tar has \d+ bytes, .*index.json says {len(content)}: it was {word}"
    with pytest.raises(DataError, match=message):
        check_shard_files(load_manifest(folder, "train"))
    with pytest.raises(DataError, match=word):
        read_all(folder)


@pytest.mark.parametrize("damage", [lambda n: b"\xff\xff", lambda n: bytes(n)])
def test_damaged_tokens(folder, damage):
    """A few flipped bits, or a hole of zeros. Caught mutation: no check on first touch."""
    entry = open_shards(folder)[1].table[2]
    overwrite(shard_path(folder, 1), entry.token_offset + 10, damage(100))
    check_shard_files(load_manifest(folder, "train"))
    with pytest.raises(
        DataError, match=r"shard-000001.tar: block 2: crc32 of the tokens is .*, expected .*index.json.*verify"
    ):
        read_all(folder)


def test_damaged_document_ends(folder):
    flip(shard_path(folder, 0), open_shards(folder)[0].table[1].document_offset)
    with pytest.raises(DataError, match=r"shard-000000.tar: block 1: crc32 of the document ends is"):
        open_shards(folder)[0].ends_between(0, 1000)


def test_damaged_block_table(folder):
    info = load_manifest(folder, "train").shard(3)
    flip(shard_path(folder, 3), info.index_offset + info.index_bytes - 1)
    with pytest.raises(DataError, match=r"shard-000003.tar: crc32 of member __index__ is .*, expected"):
        read_all(folder)


def test_shard_in_the_place_of_another(folder):
    """A file of the same size from another corpus is refused by its block table. Caught mutation: no check of it."""
    other = make_corpus(folder.parent / "other", seed=1)
    size = shard_path(folder, 0).stat().st_size
    shard_path(folder, 0).write_bytes(shard_path(other, 0).read_bytes()[:size].ljust(size, b"\0"))
    with pytest.raises(DataError, match=r"shard-000000.tar: crc32 of member __index__ is"):
        read_all(folder)


def test_index_of_another_corpus(folder):
    """A table whose counts don't fit the shard is refused even where size and checksum agree."""
    change_table(folder, 0, tokens=load_manifest(folder, "train").shard(0).tokens + 1)
    with pytest.raises(
        DataError, match=r"member __index__ counts \(blocks, tokens, documents\) = \(\d+, \d+, \d+\), expected"
    ):
        read_all(folder)


def test_token_id_out_of_range(folder):
    change_index(folder, vocab_size=50)
    with pytest.raises(DataError, match=r"shard-000000.tar: block 0 holds token id \d+, vocab_size = 50"):
        read_all(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index_offset": -5}, r"member __index__ should be \d+ bytes at -5, the file has"),
        ({"index_offset": 1 << 60}, r"member __index__ should be \d+ bytes at 1152921504606846976"),
        ({"index_bytes": 1 << 60}, r"should be 1152921504606846976 bytes"),
        ({"index_bytes": 0, "index_crc32": 0}, "is no block table"),
        ({"blocks": 1 << 62}, r"is no block table .*shape \(4, 6\), expected uint64 and \(4611686018427387904, 6\)"),
    ],
)
def test_hostile_table_of_shards(folder, changes, message):
    """Caught mutation: no check of the place, which ends in a slice of other bytes or an error of numpy."""
    change_table(folder, 0, **changes)
    with pytest.raises(DataError, match=message):
        read_all(folder)


def test_empty_shard_that_the_table_knows(folder):
    shard_path(folder, 0).write_bytes(b"")
    change_table(folder, 0, bytes=0)
    with pytest.raises(DataError, match=r"shard-000000.tar is empty"):
        read_all(folder)


def huge_table():
    """A header that promises 2^40 rows, and no rows."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<u8", "fortran_order": False, "shape": (1 << 40, 6)})
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(np.zeros((4, 6), "<i4")), r"type int32 and shape \(4, 6\), expected uint64"),
        (npy(np.zeros((4, 5), "<u8")), r"type uint64 and shape \(4, 5\), expected"),
        (npy(np.zeros(24, "<u8")), r"shape \(24,\)"),
        (npy(np.asfortranarray(np.zeros((4, 6), "<u8"))), "expected"),
        (npy(np.zeros((0, 6), "<u8")), r"shape \(0, 6\)"),
        (npy(np.zeros((4, 6), "<u8"))[:-3], "189 bytes"),
        (huge_table(), r"shape \(1099511627776, 6\)"),
        (b"\x93NUMPY\x01\x00\xff\xff{'descr': ", "not a .npy file"),
        (b"no table at all", "not a .npy file"),
        (b"", "not a .npy file"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else str(value)[:30],
)
def test_hostile_block_table(folder, content, message):
    """Whatever a table holds whose checksum agrees: a message, and no memory for what its header claims."""
    change_block_table(folder, 1, content)
    with pytest.raises(DataError, match=rf"shard-000001.tar: member __index__ is no block table .*{message}"):
        read_all(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("token_offset", (1 << 64) - 2),
        ("token_offset", 1 << 40),
        ("document_offset", 1 << 40),
        ("document_offset", (1 << 64) - 1),
    ],
)
def test_block_outside_the_file(folder, field, value):
    table = block_table(folder, 1)
    table[2, BlockEntry._fields.index(field)] = value
    change_block_table(folder, 1, npy(table))
    with pytest.raises(DataError, match=r"shard-000001.tar: block 2: .* don't lie within the \d+ bytes of the file"):
        read_all(folder)


def test_block_without_documents(folder):
    """Counts that only add up. Caught mutation: no lower bound on a block's documents."""
    table = block_table(folder, 1)
    table[0, 3] += table[1, 3]
    table[1, 3] = 0
    change_block_table(folder, 1, npy(table))
    with pytest.raises(DataError, match=r"block 1: .* in 0 documents"):
        read_all(folder)


@pytest.mark.parametrize(
    "change", [lambda e: e[::-1], lambda e: e - 1, lambda e: e * 0, lambda e: np.append(e[-2::-1], e[-1])]
)
def test_document_ends_that_do_not_rise_to_the_block(folder, change):
    """Caught mutations: no check beyond the checksum; the last end alone."""
    entry, table = open_shards(folder)[1].table[0], block_table(folder, 1)
    ends = change(open_shards(folder)[1].document_ends(0)).astype("<u4")
    overwrite(shard_path(folder, 1), entry.document_offset, ends.tobytes())
    table[0, 5] = zlib.crc32(ends.tobytes())
    change_block_table(folder, 1, npy(table))
    with pytest.raises(DataError, match=r"shard-000001.tar: block 0: its \d+ document ends, the last one \d+, don't"):
        read_all(folder)


def test_bytes_in_memory_are_a_shard(folder):
    """A shard that was fetched into memory gives what the mapped file gives."""
    manifest, mapped = load_manifest(folder, "train"), open_shards(folder)[2]
    held = Shard(manifest, 2, shard_path(folder, 2).read_bytes())
    assert held.read(5, 900).tolist() == mapped.read(5, 900).tolist()
    assert held.ends_between(5, 900) == mapped.ends_between(5, 900)
