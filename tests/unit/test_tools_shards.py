"""The shard format, read by others: numpy and tarfile alone, and stock webdataset."""

import hashlib
import io
import json
import struct
import tarfile
import zlib

import numpy as np
import webdataset

from tests.support.corpus import make_corpus, synthetic_documents


def test_numpy_and_tarfile_read_a_shard(tmp_path):
    """Follows docs/data_format.md with nothing of megascale's."""
    split = make_corpus(tmp_path / "corpus") / "train"
    index, table_content = json.loads((split / "index.json").read_text()), (split / "shards.npy").read_bytes()
    assert hashlib.sha256(table_content).hexdigest() == index["table_sha256"]
    shards = np.load(io.BytesIO(table_content))
    assert len(shards) == index["num_shards"]
    read = []
    for shard in shards:
        path = split / f"shard-{shard['number']:06d}.tar"
        content = path.read_bytes()
        assert (len(content), hashlib.sha256(content).digest()) == (shard["bytes"], bytes(shard["sha256"]))
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            arrays = {m.name: np.load(io.BytesIO(tar.extractfile(m).read())) for m in members}
        assert members[-1].name == "__index__"
        assert {m.mtime for m in members} == {0}
        table = arrays["__index__"]
        assert (members[-1].offset_data, members[-1].size) == (shard["index_offset"], shard["index_bytes"])
        assert table.dtype == np.dtype("<u8")
        assert table.shape == (shard["blocks"], 6)
        number = shard["number"]
        for block, row in enumerate(table.tolist()):
            tokens = arrays[f"{number:06d}_{block:06d}.tokens.npy"]
            ends = arrays[f"{number:06d}_{block:06d}.docs.npy"]
            assert row[1::2] == [len(tokens), len(ends), zlib.crc32(ends)]
            assert row[4] == zlib.crc32(tokens)
            assert content[row[0] : row[0] + 2 * len(tokens)] == tokens.tobytes()
            assert struct.unpack_from("<I", content, row[2])[0] == ends[0]
            assert row[0] % 64 == row[2] % 64 == 0
            read += np.split(tokens, ends[:-1])
    assert [doc.tolist() for doc in read] == [doc.tolist() for doc in synthetic_documents(64, 97, 0)]


def test_stock_webdataset_reads_the_corpus(tmp_path):
    split = make_corpus(tmp_path / "corpus") / "train"
    urls = sorted(str(path) for path in split.glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len({sample["__key__"] for sample in samples}) == len(samples) > 8
    tokens = np.concatenate([sample["tokens.npy"] for sample in samples])
    assert tokens.tolist() == np.concatenate(list(synthetic_documents(64, 97, 0))).tolist()


def test_blocks_and_shards_close_at_the_end_of_a_document(tmp_path):
    split = make_corpus(tmp_path / "corpus") / "train"
    shards = np.load(split / "shards.npy")
    assert [shard["tokens"] >= 2048 for shard in shards] == [True, True, True, False]
    assert all(shard["tokens"] < 2048 + 512 + 200 for shard in shards)
    for sample in webdataset.WebDataset([str(split / "shard-000000.tar")], shardshuffle=False).decode():
        ends, tokens = sample["docs.npy"], sample["tokens.npy"]
        assert ends[-1] == len(tokens) >= 512
        assert ends[-2] < 512
        assert (tokens[ends - 1] == 0).all()


def test_equal_documents_give_equal_files(tmp_path):
    first, second = (make_corpus(tmp_path / name) for name in ("a", "b"))
    for path in sorted((first / "train").iterdir()):
        assert path.read_bytes() == (second / "train" / path.name).read_bytes(), path.name
