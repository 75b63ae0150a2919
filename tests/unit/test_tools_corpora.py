"""Reading text: nothing is skipped silently, the order depends on names only."""

import json
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.corpora import cut_source, find_source, python_stdlib_folder
from data_tools.readers import PAIR_SEPARATOR, ReadCounts, read_documents, read_piece, split_text
from megascale.errors import DataError


def read(source, *patterns, **options):
    counts = ReadCounts()
    texts = [document.text for document in read_documents(find_source(str(source), patterns, **options), counts)]
    return texts, counts


def test_folder_in_the_order_of_names(tmp_path):
    (tmp_path / "b").mkdir()
    for name, text in {"c.txt": "3", "b/a.md": "2", "a.py": "1", "skipped.bin": "no"}.items():
        (tmp_path / name).write_text(text)
    assert read(tmp_path)[0] == ["1", "2", "3"]
    assert read(tmp_path, "**/*.md", "*.txt")[0] == ["2", "3"]


def test_bad_utf8_is_replaced_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_text("café")
    texts, counts = read(tmp_path)
    assert texts == ["caf\ufffd", "café"]
    assert (counts.documents, counts.bad_utf8, counts.bad_utf8_files) == (2, 1, ["a.txt"])


def test_empty_documents_are_dropped_and_counted(tmp_path):
    for name, text in {"a.txt": "", "b.txt": " \n\t", "c.txt": "text"}.items():
        (tmp_path / name).write_text(text)
    texts, counts = read(tmp_path)
    assert texts == ["text"]
    assert (counts.documents, counts.empty) == (1, 2)


def test_separator_cuts_a_text_file(tmp_path):
    (tmp_path / "a.txt").write_text("one<>two<><>three")
    texts, counts = read(tmp_path / "a.txt", separator="<>")
    assert texts == ["one", "two", "three"]
    assert counts.empty == 1


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"body": "one"}), "", json.dumps({"body": None}), '{"body": "lone \\ud800"}']
    path.write_text("\n".join(lines))
    texts, counts = read(path, text_field="body")
    assert texts == ["one", "lone \ufffd\ufffd\ufffd"]
    assert (counts.documents, counts.empty, counts.bad_utf8) == (2, 2, 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', r"a.jsonl line 2 isn't JSON"),
        ('{"body": "x"}', r"a.jsonl line 2 has no field 'text'; its fields: \['body'\]; choose by --text-field"),
        ("[1]", r"a.jsonl line 2 has no field 'text'"),
        ('{"text": 3}', r"a.jsonl line 2 holds a int where text is expected"),
    ],
)
def test_bad_json_lines(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", None, "two"], "n": [1, 2, 3]}), path)
    assert read(path)[0] == ["one", "two"]
    with pytest.raises(DataError, match=r"a.parquet has no column 'body'; its columns: \['text', 'n'\]"):
        read(path, text_field="body")
    with pytest.raises(DataError, match=r"a.parquet row 1 holds a int where text is expected"):
        read(path, text_field="n")
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match=r"a.parquet can't be read as parquet"):
        read(path)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        DataError, match=r"a.parquet needs pyarrow; install it with: pip install 'megascale\[parquet\]'"
    ):
        read(tmp_path)


def test_missing_source(tmp_path):
    with pytest.raises(DataError, match="is neither a file, a folder nor the word python-stdlib"):
        read(tmp_path / "none")
    with pytest.raises(DataError, match=r"has no file that matches \*\*/\*.py; choose one by --pattern"):
        read(tmp_path, "**/*.py")


def test_unreadable_file(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"a.txt can't be read \(No such file or directory\); remove it"):
        read(tmp_path)


def test_standard_library():
    source = find_source("python-stdlib")
    names = [source.name(path) for path in source.files]
    assert source.root == python_stdlib_folder()
    assert len(names) > 200
    assert "abc.py" in names
    assert not any("site-packages" in name or "dist-packages" in name for name in names)


def test_fingerprint_follows_the_files(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    first = find_source(str(tmp_path)).fingerprint
    assert find_source(str(tmp_path)).fingerprint == first
    (tmp_path / "b.txt").write_text("two")
    assert find_source(str(tmp_path)).fingerprint != first
    assert find_source(str(tmp_path), text_field="body").fingerprint != first


@settings(max_examples=200, deadline=None)
@given(lines=st.lists(st.text("ab\\né", max_size=12), max_size=20), chunk_bytes=st.integers(1, 60), end=st.booleans())
def test_pieces_of_json_lines_hold_every_line_once(tmp_path_factory, lines, chunk_bytes, end):
    """Caught mutations: the skip from `start` instead of `start - 1`; `first <= piece.stop`."""
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"x{line}"}) for line in lines) + "\n" * end)
    source, counts = find_source(str(path)), ReadCounts()
    pieces = [piece for chunk in cut_source(source, chunk_bytes) for piece in chunk]
    texts = [document.text for piece in pieces for document in read_piece(source, piece, counts)]
    assert texts == [f"x{line}" for line in lines]
    assert sum(piece.num_bytes for piece in pieces) == path.stat().st_size


def test_bad_line_in_a_later_piece_is_counted_from_the_start(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' * 100 + '{"text": \n')
    source = find_source(str(path))
    *_, last = [piece for chunk in cut_source(source, 300) for piece in chunk]
    assert last.start > 0
    with pytest.raises(DataError, match=r"a.jsonl line 101 isn't JSON"):
        list(read_piece(source, last, ReadCounts()))


def test_chunks_are_of_about_one_size_in_the_order_of_names(tmp_path):
    for number in range(30):
        (tmp_path / f"{number:02d}.txt").write_text("x" * 100)
    (tmp_path / "15.txt").write_text("x" * 5000)
    chunks = cut_source(find_source(str(tmp_path)), 1000)
    assert [piece.path.name for chunk in chunks for piece in chunk] == [f"{n:02d}.txt" for n in range(30)]
    assert [len(chunk) for chunk in chunks] == [10, 6, 10, 4]


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(st.text("ab<>é", max_size=9), max_size=9), read_bytes=st.integers(1, 20))
def test_separators_at_any_place(tmp_path_factory, texts, read_bytes):
    """Caught mutation: `searched` at the end of what was read; a separator across two reads would be missed."""
    path = tmp_path_factory.mktemp("texts") / "a.txt"
    path.write_text("<>".join(texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_tools.readers.READ_BYTES", read_bytes)
        with path.open("rb") as file:
            found = list(split_text(file, b"<>", path))
    assert [text.decode() for text in found] == "<>".join(texts).split("<>")


def test_endless_line_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("data_tools.readers.MAX_DOCUMENT_BYTES", 100)
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + "x" * 200)
    with pytest.raises(DataError, match=r"a.jsonl: the line at byte 17 is longer than 100 bytes, the most that one"):
        read(tmp_path)
    (tmp_path / "a.jsonl").rename(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"a.txt is longer than 100 bytes, .*--separator for text files"):
        read(tmp_path)


@pytest.mark.parametrize(("name", "lines"), [
    ("a.jsonl", ['{"source": "one", "target": "two"}', "", '{"source": "tab\\tin", "target": "it"}']),
    ("a.tsv", ["one\ttwo", "", "no quotes: \"x\ty"]),
])
def test_a_line_is_a_pair(tmp_path, name, lines):
    """Seen to catch: the fields of JSON asked of a line of a table."""
    (tmp_path / name).write_text("\n".join(lines) + "\r\n")
    source = replace(find_source(str(tmp_path / name), text_field="source"), target_field="target")
    counts, pieces = ReadCounts(), [piece for chunk in cut_source(source, 10) for piece in chunk]
    texts = [document.text for piece in pieces for document in read_piece(source, piece, counts)]
    assert [text.split(PAIR_SEPARATOR) for text in texts] == [
        ["one", "two"], ["tab\tin", "it"] if name == "a.jsonl" else ['no quotes: "x', "y"]
    ]
    assert counts.empty == 1


@pytest.mark.parametrize(("name", "line", "words"), [
    ("a.tsv", "one", "line 1 has 1 columns; a pair has two"),
    ("a.tsv", "one\t ", "line 1 isn't a pair: a text is empty"),
    ("a.txt", "one\ttwo", "pairs are read from .jsonl or .tsv"),
])
def test_what_is_no_pair_is_refused(tmp_path, name, line, words):
    (tmp_path / name).write_text(line)
    source = replace(find_source(str(tmp_path / name), text_field="source"), target_field="target")
    ((piece,),) = cut_source(source, 1000)
    with pytest.raises(DataError, match=words):
        list(read_piece(source, piece, ReadCounts()))
