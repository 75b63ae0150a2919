"""Raw WebDatasets as a source: what webdataset wrote is read, and every damage is an error, never a silent end."""

import gzip
import io
import json
import tarfile

import pytest
import webdataset

from data_tools.corpora import find_source
from data_tools.readers import ReadCounts, read_documents
from megascale.errors import DataError
from tests.support.corpus import make_corpus

TEXTS = [f"text number {number}\n" * (1 + 40 * (number % 3)) for number in range(10)]


@pytest.fixture
def path(tmp_path):
    """Ten samples as webdataset writes them: text, something else, and metadata."""
    path = tmp_path / "raw-000.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number, text in enumerate(TEXTS):
            writer.write({"__key__": f"folder/{number:04d}", "txt": text, "jpg": b"\xff\xd8 no text", "cls": number})
    return path


def read(path):
    counts = ReadCounts()
    return [document.text for document in read_documents(find_source(str(path)), counts)]


def write_members(path, members):
    """A tar of (name, content or type and link's target) by tarfile, which checks nothing."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content
                tar.addfile(info)


def test_what_webdataset_wrote(path):
    assert read(path) == TEXTS


def test_json_members_and_folders_of_tars(tmp_path):
    for name in ("b", "a"):
        with webdataset.TarWriter(str(tmp_path / f"{name}.tar")) as writer:
            for number in range(2):
                writer.write({"__key__": f"{name}{number}", "json": {"body": f"{name} {number}"}})
    source = find_source(str(tmp_path), text_field="body")
    assert [document.text for document in read_documents(source, ReadCounts())] == ["a 0", "a 1", "b 0", "b 1"]
    with pytest.raises(DataError, match=r"a.tar member a0.json has no field 'text'; its fields: \['body'\]"):
        read(tmp_path)


def test_code_and_pickles_are_never_decoded(tmp_path):
    marker = tmp_path / "marker"
    pickled = b"cbuiltins\nexec\n(S'open(\"" + str(marker).encode() + b"\", \"w\")'\ntR."
    write_members(
        tmp_path / "a.tar", [("a.txt", b"text"), ("a.pyd", pickled), ("a.pkl", pickled), ("a.pth", pickled)]
    )
    assert read(tmp_path) == ["text"]
    assert not marker.exists()


def member_edges(path):
    with tarfile.open(path) as tar:
        return [member.offset for member in tar.getmembers()]


def cut_at_an_edge(path, content):
    return content[: member_edges(path)[15]]


def cut_in_a_header(path, content):
    return content[: member_edges(path)[15] + 200]


def cut_in_content(path, content):
    with tarfile.open(path) as tar:
        return content[: tar.getmember("folder/0005.txt").offset_data + 1]


def flip_in_a_header(path, content):
    content[member_edges(path)[9] + 130] ^= 1
    return content


def flip_a_checksum(path, content):
    content[member_edges(path)[9] + 150] ^= 1
    return content


def hole_of_zeros(path, content):
    start = member_edges(path)[9]
    content[start : start + 1024] = bytes(1024)
    return content


def goes_on_after_its_end(path, content):
    return content + content


def nothing(path, content):
    return b""


def compressed(path, content):
    return gzip.compress(bytes(content))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut_at_an_edge, r"byte \d+: no more bytes where a member .* cut short"),
        (cut_in_a_header, r"byte \d+: only 200 bytes of a header .* cut short"),
        (cut_in_content, r"byte \d+: .*cut short"),
        (flip_in_a_header, r"byte \d+: the header"),
        (flip_a_checksum, r"byte \d+: the header"),
        (hole_of_zeros, r"byte \d+: the tar ends there, but other bytes than zeros follow"),
        (goes_on_after_its_end, r"byte \d+: the tar ends there, but other bytes than zeros follow"),
        (nothing, r"byte 0: no more bytes"),
        (compressed, r"byte 0: only \d+ bytes of a header|byte 0: the header"),
    ],
)
def test_damage_is_an_error(path, damage, words):
    """Of these, webdataset takes six for the end of the tar, in silence. Caught mutation: no walk before it reads."""
    path.write_bytes(damage(path, bytearray(path.read_bytes())))
    with pytest.raises(DataError, match=rf"raw-000.tar: {words}"):
        read(path)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("a.txt", b"x"), ("a.txt", b"y")], "member a.txt is there twice"),
        ([("/etc/a.txt", b"x")], "member '/etc/a.txt' isn't a name within the tar"),
        ([("b/../../a.txt", b"x")], "isn't a name within the tar: absolute, empty or with `..`"),
        ([("a.txt", (tarfile.SYMTYPE, "/etc/passwd"))], "member a.txt is a symbolic link"),
        ([("b.txt", b"x"), ("a.txt", (tarfile.LNKTYPE, "b.txt"))], "member a.txt is a hard link"),
        ([("a.txt", (tarfile.CHRTYPE, ""))], "member a.txt is a character device"),
        ([("a.txt", (tarfile.FIFOTYPE, ""))], "member a.txt is a named pipe"),
        ([("a.jpg", b"x"), ("a.cls", b"y")], r"sample a has no member .txt or .json to take text from, only: \['jpg"),
        ([("a.txt", b"x"), ("b.txt", b"y"), ("a.json", b"{}")], "the members of sample a lie apart; sort the tar"),
        ([("a.txt", b"x"), ("a.TXT", b"y")], r"can't be read by webdataset \(.*duplicate file name"),
        ([("__meta__/a.txt", b"x"), ("b.txt", b"y")], "webdataset reads 1 samples, its headers hold 2"),
        ([("a.json", b"[" * 100_000)], "member a.json isn't JSON"),
        ([("a.txt", b"x" * 2000)], "member a.txt has 2000 bytes, a text may have 1000"),
    ],
)
def test_hostile_and_useless_tars(tmp_path, monkeypatch, members, words):
    if members[0][1] == b"x" * 2000:
        monkeypatch.setattr("data_tools.readers.MAX_DOCUMENT_BYTES", 1000)
    write_members(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=rf"a.tar.* {words}"):
        read(tmp_path)


def test_our_own_shards_are_no_text(tmp_path):
    folder = make_corpus(tmp_path / "corpus") / "train"
    with pytest.raises(DataError, match=r"sample 000000_000000 has no member .txt or .json .*'docs.npy', 'tokens.npy'"):
        read(folder)


def test_empty_texts_are_counted(tmp_path):
    members = [("a.txt", b" \n"), ("b.txt", b"x"), ("c.json", json.dumps({"text": None}).encode())]
    write_members(tmp_path / "a.tar", members)
    counts = ReadCounts()
    assert [d.text for d in read_documents(find_source(str(tmp_path)), counts)] == ["x"]
    assert (counts.documents, counts.empty) == (1, 2)
