"""`megascale data verify` on what it must accept, and on faults that no single shard shows."""

import shutil

import numpy as np
import pytest

from data_tools.document_hash import hash_documents
from data_tools.verify import verify_corpus
from data_tools.write_shards import write_index, write_shards
from megascale.data.manifest import load_manifest
from megascale.errors import DataError
from tests.support.corpus import QUIET, make_corpus, make_text_corpus, synthetic_documents


@pytest.mark.parametrize("make", [make_corpus, make_text_corpus])
def test_good_corpora_are_good(tmp_path, make):
    """Also in a folder with a name that is no url. Caught mutation: giving webdataset the path of a shard."""
    folder = make(tmp_path / "corpus #1 {a,b}?")
    assert [manifest.split for manifest in verify_corpus(folder, QUIET)] == ["train", "validation"]


def test_a_vocabulary_of_32_bits_is_good(tmp_path):
    assert verify_corpus(make_corpus(tmp_path / "corpus", vocab_size=70_000), QUIET)[0].index.dtype == "uint32"


def write_split(folder, split, documents):
    index = load_manifest(str(folder), split).index
    shutil.rmtree(folder / split)
    write_index(
        folder / split, write_shards(folder / split, documents, np.dtype("<u2"), 2048, 512), split=split,
        **{key: getattr(index, key) for key in (
            "dtype", "vocab_size", "eos_id", "text_bytes", "tokenizer_file", "tokenizer_sha256")},
    )


def test_a_document_in_both_splits_is_found(tmp_path):
    """Caught mutations: comparing documents by their length, or within a split only."""
    folder = make_corpus(tmp_path / "corpus")
    train, others = list(synthetic_documents(64, 97, 0)), list(synthetic_documents(16, 97, 1))
    write_split(folder, "validation", [*others[:7], train[40], *others[7:]])
    with pytest.raises(DataError, match=r"1 of 17 documents of .*validation are in .*train too, the first is number 7"):
        verify_corpus(folder, QUIET)


def test_copies_within_a_split_are_no_fault(tmp_path):
    folder = make_corpus(tmp_path / "corpus")
    write_split(folder, "train", [*synthetic_documents(20, 97, 0)] * 2)
    assert len(verify_corpus(folder, QUIET)) == 2


def test_documents_that_do_not_end_are_found(tmp_path):
    folder = make_corpus(tmp_path / "corpus")
    documents = list(synthetic_documents(20, 97, 0))
    documents[3][-1] = 5
    write_split(folder, "train", documents)
    with pytest.raises(DataError, match=r"shard-000000.tar: block 0 doesn't end its documents with token 0"):
        verify_corpus(folder, QUIET)


def test_a_shard_that_the_index_does_not_know_is_found(tmp_path):
    folder = make_corpus(tmp_path / "corpus")
    shutil.copy(folder / "train/shard-000000.tar", folder / "train/shard-000009.tar")
    with pytest.raises(DataError, match=r"holds 1 tars that .* doesn't list, such as shard-000009.tar; .*data index"):
        verify_corpus(folder, QUIET)


def test_a_broken_split_does_not_hide_the_damage_of_the_other(tmp_path):
    folder = make_corpus(tmp_path / "corpus")
    (folder / "train/index.json").write_text("{}")
    path = folder / "validation/shard-000000.tar"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError) as refused:
        verify_corpus(folder, QUIET)
    assert "train/index.json is no index" in str(refused.value)
    assert "validation/shard-000000.tar has" in str(refused.value)


def test_hashes_tell_documents_apart():
    """Also where only the border between two documents differs."""
    tokens = np.array([1, 2, 3, 0, 1, 2, 3, 0], np.uint16)
    first, second = hash_documents(tokens, np.array([4, 8], np.uint32))
    assert first == second
    apart = hash_documents(tokens, np.array([3, 8], np.uint32))
    assert len({first, *apart}) == 3
    assert hash_documents(tokens.astype(np.uint32), np.array([4, 8]))[0] == first
