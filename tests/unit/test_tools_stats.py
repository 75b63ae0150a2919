"""`megascale data stats` and `count`: every figure against rows read one by one."""

import json
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from data_tools.cli import app
from data_tools.count import count_rows
from data_tools.stats import corpus_stats, format_stats
from megascale.config.data import CorpusConfig, DataConfig
from megascale.data.row_counts import count_command
from megascale.data.rows import open_corpus
from megascale.errors import DataError
from tests.support.corpus import QUIET, make_corpus, synthetic_documents
from tests.unit.test_tools_verify import write_split


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A training split with copies of 3 documents, and a validation split with one of them."""
    folder = make_corpus(tmp_path_factory.mktemp("stats") / "corpus")
    documents = list(synthetic_documents(64, 97, 0))
    write_split(folder, "train", [*documents, *documents[10:13], documents[10]])
    write_split(folder, "validation", [*synthetic_documents(16, 97, 1), documents[12]])
    return folder


def test_documents_ids_and_copies(corpus):
    documents = list(synthetic_documents(64, 97, 0))
    copies = [*documents[10:13], documents[10]]
    stats = corpus_stats(corpus, 32, QUIET)
    train, validation = stats["train"], stats["validation"]
    lengths = sorted(len(document) for document in [*documents, *copies])
    assert (train["documents"], train["tokens"]) == (68, sum(lengths))
    assert (train["length"]["min"], train["length"]["max"]) == (lengths[0], lengths[-1])
    assert train["length"]["p50"] == lengths[34]
    assert (train["copies"], train["copied_tokens"]) == (4, sum(map(len, copies)))
    assert train["ids_used"] == len(np.unique(np.concatenate(documents)))
    assert validation["documents_in_train"] == 1
    assert "documents_in_train" not in train
    assert train["unknown_token"] == "<|endoftext|>"
    assert train["unknown_tokens"] == 68


FIRST = len(next(synthetic_documents(64, 97, 0)))
"""Tokens of the first document: a row of as many holds it whole."""


@pytest.mark.parametrize("seq_len", [16, 60, 250, FIRST - 1])
@pytest.mark.parametrize("packing", ["concat", "bestfit", "none"])
def test_rows_padding_and_cuts_are_those_of_the_rows_themselves(corpus, packing, seq_len):
    """Caught mutations: the overlap left out of a row's tokens; a document that ends with its row counted as cut."""
    data, source = DataConfig(folder=str(corpus), packing=packing), CorpusConfig(folder=str(corpus), weight=1)
    rows = open_corpus("corpus", source, "train", data, seq_len, 97)
    labels, cut = 0, set()
    for shard, num_rows in enumerate(rows.rows_per_shard.tolist()):
        whole = {}
        for row in range(num_rows):
            labels += len(rows.read(shard, row).tokens) - 1
            for piece in rows.describe(shard, row):
                ends = rows.store.open(shard).document_ends(piece.block)
                start = int(ends[piece.document - 1]) if piece.document else 0
                whole.setdefault((piece.block, piece.document), set()).add(
                    piece.stop - piece.start == int(ends[piece.document]) - start)
        cut |= {(shard, *document) for document, found in whole.items() if found == {False}}
    found = corpus_stats(corpus, seq_len, QUIET)["train"]["packing"][packing]
    assert found["rows"] == rows.num_rows
    assert found["padding_fraction"] == pytest.approx(1 - labels / (rows.num_rows * seq_len), abs=1e-12)
    assert found["documents_cut"] == len(cut)


def test_the_table_and_the_json_hold_the_same(corpus):
    result = CliRunner().invoke(app, ["stats", str(corpus), "--seq-len", "60", "--json"])
    stats = json.loads(result.stdout)
    assert stats == corpus_stats(corpus, 60, QUIET)
    lines = format_stats(stats).splitlines()
    assert lines[0].split() == ["train", "validation"]
    assert any(line.split()[:2] == ["documents", "68"] for line in lines)
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("fim", [False, True])
def test_count_writes_what_a_run_needs(corpus, tmp_path, fim):
    """Caught mutation: no room for the tokens of fill-in-the-middle."""
    folder = shutil.copytree(corpus, tmp_path / "corpus", ignore=shutil.ignore_patterns("rows-*"))
    lines = count_rows(folder, 60, "bestfit", fim)
    assert [("train" in line, "validation" in line) for line in lines] == [(True, False), (False, True)]
    (path,) = (folder / "train").glob("rows-bestfit-*.npy")
    stamp = path.stat().st_mtime_ns
    data = DataConfig(folder=str(folder), packing="bestfit", fim={
        "prefix_token": "w90", "middle_token": "w91", "suffix_token": "w92"})
    source = CorpusConfig(folder=str(folder), weight=1, fim_fraction=0.5 if fim else 0)
    rows = open_corpus("corpus", source, "train", data, 60, 97)
    assert f"{rows.num_rows:,} rows" in lines[0]
    assert [found.name for found in (folder / "train").glob("rows-*")] == [path.name]
    assert path.stat().st_mtime_ns == stamp


def test_a_corpus_elsewhere_is_told_how_to_count_rows_that_share_no_token(corpus, tmp_path):
    """As BERT and T5 read them. Caught mutation: an overlap of 1 whatever was asked for."""
    folder = shutil.copytree(corpus, tmp_path / "corpus", ignore=shutil.ignore_patterns("rows-*"))
    source, data = CorpusConfig(folder=str(folder), weight=1), DataConfig(folder=str(folder), packing="bestfit")
    count_rows(folder, 60, "bestfit", False, overlap=0)
    (path,) = (folder / "train").glob("rows-*")
    rows = open_corpus("corpus", source, "train", data, 60, 97, 60, 0)
    assert [found.name for found in (folder / "train").glob("rows-*")] == [path.name]
    assert count_command(rows.manifest, rows.packing).endswith(" --seq-len 60 --overlap 0 --packing bestfit")


def test_concat_needs_no_counts(corpus):
    with pytest.raises(DataError, match="--packing concat needs no counts"):
        count_rows(corpus, 60, "concat", False)
