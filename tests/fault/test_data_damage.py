"""Damaged and hostile corpora: an error that names the place and the remedy, or exactly the tokens that were written.

Each fault is met by the first of three readers that can see it: `open` (what a run does before its first step), `read`
(rows of every block), `verify` (the command). Whatever `open` and `read` let pass must not have changed a token.
"""

import hashlib
import io
import json
import resource
import shutil
import tarfile
import zlib

import numpy as np
import pytest

from data_tools.verify import verify_corpus
from data_tools.write_shards import npy_bytes, write_file
from megascale.config.data import CorpusConfig, DataConfig
from megascale.data.manifest import check_shard_files, load_manifest, read_tokenizer, table_bytes
from megascale.data.rows import open_corpus
from megascale.errors import DataError
from tests.support.corpus import QUIET, make_corpus
from tests.support.file_faults import run_forked

SEQ_LEN = 60
SHARD = "shard-000001.tar"
GROWTH_LIMIT_KIB = 200 << 10
BLOCK = tarfile.BLOCKSIZE
REMEDIES = ("restore", "build the corpus again", "build it again")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """4 training shards of about 4 blocks, 97 token ids."""
    return make_corpus(tmp_path_factory.mktemp("whole") / "corpus")


@pytest.fixture(scope="module")
def whole_rows(whole):
    return read_all(whole)


@pytest.fixture
def corpus(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "corpus")


def open_split(folder):
    """What a run does before its first step."""
    manifest = load_manifest(str(folder), "train")
    read_tokenizer(manifest)
    check_shard_files(manifest)
    source, data = CorpusConfig(folder=str(folder), weight=1), DataConfig(folder=str(folder))
    return open_corpus("corpus", source, "train", data, SEQ_LEN, 97)


def read_all(folder):
    """Every row of every shard."""
    corpus = open_split(folder)
    return [
        corpus.read(shard, row).tokens.tolist()
        for shard, num_rows in enumerate(corpus.rows_per_shard.tolist()) for row in range(num_rows)
    ]


READERS = {"open": open_split, "read": read_all, "verify": lambda folder: verify_corpus(folder, QUIET)}


def members(path):
    """The members of an undamaged shard."""
    with tarfile.open(path) as tar:
        return tar.getmembers()


def change(place, action):
    """A damage: the bytes of the second shard pass through `action(content, members)`."""
    def damage(folder):
        path = folder / "train" / place
        content = bytearray(path.read_bytes())
        path.write_bytes(action(content, members(path)))
    return damage


def flip(offset, bit=0):
    """Flips a bit of the second shard; the offset is found from its members."""
    def action(content, found):
        content[offset(found)] ^= 1 << bit
        return content
    return change(SHARD, action)


def fill(offset, size):
    """A hole of zeros."""
    def action(content, found):
        content[offset(found) : offset(found) + size] = bytes(size)
        return content
    return change(SHARD, action)


def cut(offset):
    return change(SHARD, lambda content, found: content[: offset(found)])


def replace_shard(content):
    return lambda folder: (folder / "train" / SHARD).write_bytes(content)


def swap_first_shard(folder):
    shutil.copy(folder / "train/shard-000000.tar", folder / "train" / SHARD)


def replace_by_folder(folder):
    (folder / "train" / SHARD).unlink()
    (folder / "train" / SHARD).mkdir()


def replace_consistently(folder):
    """Another shard of the same size, right in itself: two tokens change places."""
    path = folder / "train" / SHARD
    content, found = bytearray(path.read_bytes()), members(path)
    table = np.load(io.BytesIO(bytes(content[found[-1].offset_data :])))
    start, size = int(table[0][0]), 2 * int(table[0][1])
    content[start : start + 4] = content[start + 2 : start + 4] + content[start : start + 2]
    table[0][4] = zlib.crc32(content[start : start + size])
    content[found[-1].offset_data : found[-1].offset_data + 128 + table.nbytes] = npy_bytes(table)
    path.write_bytes(content)


BYTE_FAULTS = {
    "cut at a member's edge": (cut(lambda found: found[4].offset), "open", ["bytes", "was cut short"]),
    "cut within a header": (cut(lambda found: found[4].offset + 100), "open", ["was cut short"]),
    "cut within the data": (cut(lambda found: found[4].offset_data + 300), "open", ["was cut short"]),
    "cut off its end": (cut(lambda found: found[-1].offset_data + 512), "open", ["was cut short"]),
    "grown": (change(SHARD, lambda content, found: content + bytes(512)), "open", ["bytes", "was changed"]),
    "empty file": (replace_shard(b""), "open", ["has 0 bytes", "was cut short"]),
    "gone": (lambda folder: (folder / "train" / SHARD).unlink(), "open", ["can't be opened", "No such file"]),
    "a folder": (replace_by_folder, "open", ["bytes"]),
    "another shard": (swap_first_shard, "read", ["crc32 of member __index__"]),
    "another of its size": (replace_consistently, "read", ["crc32 of member __index__", "expected"]),
    "flipped in a header's size": (flip(lambda found: found[4].offset + 130), "verify", ["byte", "checksum"]),
    "flipped in a header's name": (flip(lambda found: found[4].offset), "verify", ["byte", "checksum"]),
    "flipped in a header's type": (flip(lambda found: found[4].offset + 156), "verify", ["byte", "checksum"]),
    "flipped in tokens": (flip(lambda found: found[3].offset_data + 128 + 40, 3), "read", ["block 1: crc32 of the t"]),
    "flipped in document ends": (flip(lambda found: found[2].offset_data + 128), "read", ["block 1: crc32 of the d"]),
    "flipped in the block table": (flip(lambda found: found[-1].offset_data + 130), "read", ["member __index__"]),
    "flipped in a .npy header": (flip(lambda found: found[3].offset_data + 60), "verify", ["isn't the .npy file"]),
    "flipped in padding": (flip(lambda found: found[3].offset - 1), "verify", ["sha256"]),
    "flipped after the end": (flip(lambda found: -1), "verify", ["other bytes than zeros"]),
    "zeros for a header": (fill(lambda found: found[4].offset, 512), "verify", ["byte", "zeros"]),
    "zeros for data": (fill(lambda found: found[3].offset_data + 200, 256), "read", ["block 1: crc32 of the tokens"]),
    "zeros for a page": (fill(lambda found: found[2].offset // 4096 * 4096, 4096), "read", ["block"]),
    "zeros for all": (change(SHARD, lambda content, found: bytes(len(content))), "read", ["member __index__"]),
}
"""Sections 3 of the measured faults and rows 36 to 38: what happens to a file."""


@pytest.mark.parametrize("name", BYTE_FAULTS)
def test_a_damaged_shard_is_never_read_as_if_whole(corpus, whole_rows, name):
    """Caught mutations: no check of the size, of a block's or the block table's crc, of a tar header's checksum."""
    damage, finder, words = BYTE_FAULTS[name]
    damage(corpus)
    check_found(corpus, whole_rows, finder, [SHARD, *words])


def check_found(corpus, whole_rows, finder, words):
    """The reader that can see the fault does, those after it do too, those before it read exactly what was written."""
    names = list(READERS)
    for reader in names[: names.index(finder)]:
        found = READERS[reader](corpus)
        assert reader != "read" or found == whole_rows
    for reader in names[names.index(finder) :]:
        with pytest.raises(DataError) as refused:
            READERS[reader](corpus)
        if reader == finder:
            assert not [word for word in words if word not in str(refused.value)], str(refused.value)
        assert any(word in str(refused.value) for word in REMEDIES), str(refused.value)


def forge(folder, values=None, **index_fields):
    """A forger's split: anything in the row of the second shard or in the index, with all hashes and sums right."""
    manifest = load_manifest(str(folder), "train")
    table = manifest.table.copy()
    for field, value in (values or {}).items():
        table[field][1] = value
    facts = {"num_tokens": int(table["tokens"].sum()), "num_documents": int(table["documents"].sum())}
    forge_files(folder, table_bytes(table), **facts, **index_fields)


def forge_files(folder, table, **index_fields):
    path = folder / "train/index.json"
    index = json.loads(path.read_text()) | {"table_sha256": hashlib.sha256(table).hexdigest()} | index_fields
    write_file(folder / "train/shards.npy", table)
    path.write_text(json.dumps(index))


def forge_tail(*infos):
    """A damage: a tar that goes on after its last member, with an index that agrees."""
    def damage(folder):
        path = folder / "train" / SHARD
        last = members(path)[-1]
        end = last.offset_data + -(-last.size // BLOCK) * BLOCK
        content = path.read_bytes()[:end] + b"".join(infos) + bytes(2 * BLOCK)
        path.write_bytes(content)
        forge(folder, {"bytes": len(content), "sha256": np.frombuffer(hashlib.sha256(content).digest(), "u1")})
    return damage


def member(name, content=b"", kind=tarfile.REGTYPE, target=""):
    """A member as bytes of a tar."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, target
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % BLOCK)


def forge_cut(folder):
    """A tar without the zeros that end one, with an index that agrees."""
    path = folder / "train" / SHARD
    last = members(path)[-1]
    content = path.read_bytes()[: last.offset_data + -(-last.size // BLOCK) * BLOCK]
    path.write_bytes(content)
    forge(folder, {"bytes": len(content), "sha256": np.frombuffer(hashlib.sha256(content).digest(), "u1")})


BOMB = b"cos\nmkdir\n(S'bomb-went-off'\ntR."
"""A pickle that makes a folder when it is loaded."""
FORGED_TARS = {
    "a member twice": (forge_tail(member("000001_000000.tokens.npy")), ["000001_000000.tokens.npy is there twice"]),
    "an absolute path": (forge_tail(member("/etc/cron.d/x", b"x")), ["'/etc/cron.d/x'", "absolute"]),
    "a path outside": (forge_tail(member("a/../../x.docs.npy", b"x")), ["'a/../../x.docs.npy'", "`..`"]),
    "a symbolic link": (forge_tail(member("x.docs.npy", b"", tarfile.SYMTYPE, "/etc/passwd")), ["a symbolic link"]),
    "a hard link": (forge_tail(member("x.docs.npy", b"", tarfile.LNKTYPE, "a")), ["a hard link"]),
    "a device": (forge_tail(member("x.docs.npy", b"", tarfile.CHRTYPE)), ["a character device"]),
    "a named pipe": (forge_tail(member("x.docs.npy", b"", tarfile.FIFOTYPE)), ["a named pipe"]),
    "a sparse file": (forge_tail(member("x.docs.npy", b"", tarfile.GNUTYPE_SPARSE)), ["a sparse file"]),
    "a pickle": (forge_tail(member("000001_000009.pyd", BOMB)), ["member 000001_000009.pyd where"]),
    "a stranger": (forge_tail(member("readme.txt", b"x")), ["member readme.txt where"]),
    "no end": (forge_cut, ["was cut short"]),
    "something after the end": (forge_tail(bytes(2 * BLOCK), b"x" * BLOCK), ["other bytes than zeros follow"]),
}
"""Row 57: tars that no writer of ours made, with sizes and hashes that agree."""


@pytest.mark.parametrize("name", FORGED_TARS)
def test_a_forged_tar_is_refused_and_nothing_of_it_is_run(corpus, whole_rows, name, monkeypatch):
    """Caught mutation: verifying with webdataset before the tar walk makes the pickle's folder."""
    monkeypatch.chdir(corpus)
    damage, words = FORGED_TARS[name]
    damage(corpus)
    check_found(corpus, whole_rows, "verify", [SHARD, *words])
    assert not (corpus / "bomb-went-off").exists()


HUGE = 1 << 62
FORGED_ROWS = {
    "huge size": ({"bytes": HUGE}, "open", ["was cut short", str(HUGE)]),
    "negative size": ({"bytes": -1}, "open", ["index.json says -1"]),
    "more tokens": ({"tokens": 5000}, "read", ["counts (blocks, tokens, documents)", "5000"]),
    "more documents": ({"documents": 5000}, "read", ["counts (blocks, tokens, documents)", "5000"]),
    "more blocks": ({"blocks": 5000}, "read", ["__index__", "5000"]),
    "block table far out": ({"index_offset": HUGE}, "read", ["__index__", str(HUGE)]),
    "block table before the start": ({"index_offset": -8}, "read", ["__index__"]),
    "huge block table": ({"index_bytes": HUGE}, "read", ["__index__", str(HUGE)]),
    "another block table": ({"index_crc32": 7}, "read", ["crc32 of member __index__", "00000007"]),
    "another hash": ({"sha256": np.zeros(32, "u1")}, "verify", ["sha256 is", "0000"]),
    "another number": ({"number": 7}, "open", ["shard-000007.tar can't be opened"]),
}


@pytest.mark.parametrize("name", FORGED_ROWS)
def test_a_forged_row_of_the_table_is_refused(corpus, whole_rows, name):
    values, finder, words = FORGED_ROWS[name]
    forge(corpus, values)
    check_found(corpus, whole_rows, finder, words)


def edit_index(**fields):
    def damage(folder):
        path = folder / "train/index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return damage


def write_index_file(content):
    return lambda folder: (folder / "train/index.json").write_bytes(content)


def cut_file(name):
    return lambda folder: (folder / "train" / name).write_bytes((folder / "train" / name).read_bytes()[:-7])


def replace_tokenizer(folder):
    content = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(content.replace("w96", "w99"))


def flip_table(folder):
    path = folder / "train/shards.npy"
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)


def claim_many_shards(folder):
    """A table of 100 bytes whose header speaks of 10^12 shards."""
    path = folder / "train/shards.npy"
    forge_files(folder, path.read_bytes().replace(b"(4,)", b"(999999999999,)").replace(b" " * 11 + b"\n", b"\n"),
                num_shards=999999999999)


def break_table_header(folder):
    """Python's tokenizer, by which numpy reads the header, raises errors of its own kind."""
    forge_files(folder, (folder / "train/shards.npy").read_bytes().replace(b"}", b"{"))


OTHER_FAULTS = {
    "index gone": (lambda folder: (folder / "train/index.json").unlink(), ["no finished split 'train'"]),
    "index cut": (cut_file("index.json"), ["index.json", "can't be read"]),
    "index empty": (write_index_file(b""), ["index.json", "can't be read"]),
    "index not JSON": (write_index_file(b"\x80\x04\x95cos\nsystem\n"), ["index.json", "can't be read"]),
    "index a list": (write_index_file(b"[1, 2]"), ["no index of format 2"]),
    "index deep": (write_index_file(b"[" * 1_000_000), ["index.json", "can't be read"]),
    "index number": (write_index_file(b'{"num_tokens": 1' + b"0" * 1_000_000 + b"}"), ["index.json", "can't be read"]),
    "index of format 1": (edit_index(format_version=1, shards=[]), ["no index of format 2", "megascale data index"]),
    "index with a path": (edit_index(tokenizer_file="../tokenizer.json"), ["tokenizer_file"]),
    "negative count": (edit_index(num_tokens=-1), ["num_tokens"]),
    "other count": (edit_index(num_tokens=5), ["counts (tokens, documents)"]),
    "table gone": (lambda folder: (folder / "train/shards.npy").unlink(), ["shards.npy is missing"]),
    "table cut": (cut_file("shards.npy"), ["shards.npy", "sha256"]),
    "table flipped": (flip_table, ["shards.npy", "sha256"]),
    "table of floats": (lambda folder: forge_files(folder, npy_bytes(np.zeros((4, 9)))), ["shards.npy", "float64"]),
    "table a pickle": (lambda folder: forge_files(folder, b"\x80\x04K\x01."), ["shards.npy", "no table of shards"]),
    "table of 10^12 shards": (claim_many_shards, ["shards.npy", "999999999999"]),
    "table with a cut header": (break_table_header, ["shards.npy", "no table of shards"]),
    "other tokenizer": (replace_tokenizer, ["tokenizer.json isn't the one that made the tokens", "sha256"]),
    "tokenizer gone": (lambda folder: (folder / "tokenizer.json").unlink(), ["tokenizer.json is missing"]),
    "more ids than the model's": (edit_index(vocab_size=98), ["98 token ids", "model.vocab_size = 97"]),
}


@pytest.mark.parametrize("name", OTHER_FAULTS)
def test_a_damaged_index_table_or_tokenizer_is_refused_within_bounded_memory(corpus, name):
    """Caught mutation: numpy's own reader in place of `parse_npy` asks for 96 TB when a header says so, and fails
    otherwise with errors of Python's tokenizer."""
    damage, words = OTHER_FAULTS[name]
    damage(corpus)

    def body():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(DataError) as refused:
            open_split(corpus)
        assert not [word for word in words if word not in str(refused.value)], str(refused.value)
        assert len(str(refused.value)) < 2000
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH_LIMIT_KIB

    assert run_forked(body) == 0


@pytest.mark.parametrize(("fields", "words"), [
    ({"dtype": "uint32"}, ["block 0"]),
    ({"vocab_size": 50}, ["block 0 holds token id", "vocab_size = 50", "another tokenizer"]),
])
def test_tokens_that_the_index_says_otherwise_are_refused(corpus, whole_rows, fields, words):
    """Caught mutation: leaving out the check of ids lets a vocabulary of 50 pass."""
    edit_index(**fields)(corpus)
    check_found(corpus, whole_rows, "read", words)


def test_all_damaged_shards_of_both_splits_are_named_at_once(corpus):
    places = ("train/shard-000000.tar", "train/shard-000002.tar", "validation/shard-000000.tar")
    for place in places:
        (corpus / place).write_bytes((corpus / place).read_bytes()[:-1])
    with pytest.raises(DataError) as refused:
        verify_corpus(corpus, QUIET)
    assert "3 of " in str(refused.value)
    assert not [place for place in places if place not in str(refused.value)]
