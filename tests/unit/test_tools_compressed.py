"""Compressed text: read whole or refused by name, in bounded memory."""

import gzip
import json
import sys
import tracemalloc

import pytest
import zstandard

from data_tools.corpora import find_source
from data_tools.readers import ReadCounts, read_documents
from megascale.errors import DataError

TEXTS = [f"text number {number} " * 20 for number in range(500)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
COMPRESS = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}


def read(path):
    counts = ReadCounts()
    return [document.text for document in read_documents(find_source(str(path)), counts)]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_json_lines_and_text(tmp_path, suffix):
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(COMPRESS[suffix](LINES))
    (tmp_path / f"b.txt.{suffix}").write_bytes(COMPRESS[suffix](b"a text"))
    assert read(tmp_path) == [*TEXTS, "a text"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_several_members_or_frames_are_one_file(tmp_path, suffix):
    half = LINES.index(b"\n", len(LINES) // 2) - 3
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(COMPRESS[suffix](LINES[:half]) + COMPRESS[suffix](LINES[half:]))
    assert read(path) == TEXTS


def test_progress_is_in_bytes_of_the_file(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(LINES))
    assert sum(document.source_bytes for document in read_documents(find_source(str(path)), ReadCounts())) <= 2e4
    assert path.stat().st_size <= 2e4


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_cut_anywhere(tmp_path, suffix, share):
    """Caught mutation: the check of the last frame's end left out of ZstdFile; the end would be silent."""
    content = COMPRESS[suffix](LINES)
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=rf"a.jsonl.{suffix} is cut short: its compressed data has no end; restore it"):
        read(path)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_flipped_or_no_compressed_data(tmp_path, suffix):
    path = tmp_path / f"a.jsonl.{suffix}"
    content = bytearray(COMPRESS[suffix](LINES))
    content[len(content) // 2] ^= 255
    for damaged in (content, b"plain text, " * 9):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"a.jsonl.{suffix} (can't be decompressed|line \d+ isn't JSON|is cut)"):
            read(path)


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_bomb(tmp_path, monkeypatch, suffix, kind):
    """100 MB of nothing in 100 KB, or 3; caught mutation: a line read without a limit."""
    monkeypatch.setattr("data_tools.readers.MAX_DOCUMENT_BYTES", 1 << 20)
    path = tmp_path / f"a.{kind}.{suffix}"
    path.write_bytes(COMPRESS[suffix](b"{" * 100_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=rf"a.{kind}.{suffix}.* is longer than 1048576 bytes"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 80e6
    finally:
        tracemalloc.stop()


def test_without_zstandard(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(DataError, match=r"a.jsonl.zst needs zstandard; .* pip install 'megascale\[zst\]'"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.parquet.zst"])
def test_compression_around_what_is_read_at_random(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=rf"{name}: a \.\w+ file is read without compression around it; decompress it"):
        read(tmp_path / name)
