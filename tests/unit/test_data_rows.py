"""A split as rows: every token once in any packing, places that lead back to it, and counts that can be trusted."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.write_shards import write_index, write_shards
from megascale.config.batch_plan import BatchPlan, constant_batch
from megascale.config.data import CorpusConfig, DataConfig
from megascale.data.objectives import Causal
from megascale.data.row_counts import counts_place, store_counts
from megascale.data.rows import check_batches, open_corpus
from megascale.data.store import open_store
from megascale.errors import ConfigError, DataError
from tests.support.corpus import make_corpus
from tests.support.http_server import serve

KINDS = ("concat", "bestfit", "none")
FIM_WORDS = {"prefix_token": "w3", "middle_token": "w4", "suffix_token": "w5"}


@pytest.fixture
def folder(tmp_path):
    return make_corpus(tmp_path / "corpus")


def open_train(folder, kind="concat", seq_len=63, split="train", vocab_size=97, fim_fraction=0.0, **data):
    config = DataConfig(folder=str(folder), packing=kind, **data)
    source = CorpusConfig(folder=str(folder), weight=1.0, fim_fraction=fim_fraction)
    return open_corpus("corpus", source, split, config, seq_len, vocab_size)


def all_rows(corpus):
    """(shard, row) of every row."""
    return [(shard, row) for shard, count in enumerate(corpus.rows_per_shard) for row in range(count)]


def whole_shards(corpus):
    """The tokens of each shard."""
    store = open_store(corpus.manifest, DataConfig(folder=corpus.manifest.folder))
    return [store.open(n).read(0, int(tokens)) for n, tokens in enumerate(corpus.manifest.table["tokens"])]


@pytest.mark.parametrize("seq_len", [7, 63, 500])
def test_concat_rows_are_the_shard_cut_every_seq_len(folder, seq_len):
    """Row q of a shard is its tokens [q L, q L + L + 1)."""
    corpus = open_train(folder, seq_len=seq_len)
    for shard, whole in enumerate(whole_shards(corpus)):
        expected = [whole[start : start + seq_len + 1].tolist() for start in range(0, len(whole) - 1, seq_len)]
        found = [corpus.read(shard, row).tokens.tolist() for row in range(corpus.rows_per_shard[shard])]
        assert found == expected


@pytest.mark.parametrize(
    ("kind", "seq_len", "fim_fraction"),
    [*((kind, seq_len, 0.0) for kind in KINDS for seq_len in (5, 63, 300)), ("bestfit", 63, 0.5), ("none", 63, 0.5)],
)
def test_every_token_of_a_split_is_counted_once(folder, kind, seq_len, fim_fraction):
    """Caught mutation: `rows_of_shards` one row short in the last shard."""
    corpus = open_train(folder, kind, seq_len, fim_fraction=fim_fraction, fim=FIM_WORDS)
    rows = [corpus.read(*place) for place in all_rows(corpus)]
    assert sum(row.new_tokens for row in rows) == corpus.manifest.num_tokens
    assert len(rows) == corpus.num_rows
    for row in rows:
        assert 1 <= len(row.tokens) + corpus.packing.spare * len(row.ends) <= seq_len + 1 or kind == "concat"
        assert row.ends[-1] == len(row.tokens) <= seq_len + 1
        assert (np.diff(row.ends, prepend=0) > 0).all()


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    kind=st.sampled_from(KINDS),
    seq_len=st.integers(2, 30),
    shard_tokens=st.integers(1, 200),
    block_tokens=st.integers(1, 60),
)
def test_any_documents_in_any_shards(tmp_path_factory, lengths, kind, seq_len, shard_tokens, block_tokens):
    """Each token of a split is new once and, but for the first of its text, a label of the token before it in the same
    document once; pieces are of one document each, and end where it does or where the row is full. With documents'
    first tokens as labels too, no token is a label twice.

    Caught mutations: ends of a row counted from the shard's start; pieces of a row read in another order than their
    ends; no piece counted as resumed.
    """
    if sum(lengths) < 2 or shard_tokens == 1:
        return
    folder = tmp_path_factory.mktemp("any")
    numbered = np.split(np.arange(1, sum(lengths) + 1), np.cumsum(lengths)[:-1])
    shards = write_shards(folder / "train", numbered, np.dtype("<u4"), shard_tokens, block_tokens)
    write_index(
        folder / "train", shards, split="train", dtype="uint32", vocab_size=1 << 20, eos_id=0, text_bytes=1,
        tokenizer_file="tokenizer.json", tokenizer_sha256="0" * 64,
    )
    if max(shard.tokens for shard in shards) == 1:
        return
    corpus = open_train(folder, kind, seq_len, vocab_size=1 << 20)
    document_of = {token: number for number, document in enumerate(numbered) for token in document.tolist()}
    labels = []
    for place in all_rows(corpus):
        row = corpus.read(*place)
        for start, end in pairwise([0, *row.ends]):
            piece = row.tokens[start:end].tolist()
            assert piece == list(range(piece[0], piece[0] + len(piece)))
            assert len({document_of[token] for token in piece}) == 1
            labels += piece[1:]
        found = [piece.stop - piece.start for piece in corpus.describe(*place)]
        assert found == np.diff(row.ends, prepend=0).tolist()
    seams = {document.tolist()[0] for document in numbered}
    arrays = Causal(seq_len, 0, label_document_starts=True).assemble(
        [corpus.read(*place) for place in all_rows(corpus)], np.zeros(corpus.num_rows, np.uint64)
    )
    trained = arrays.labels_BT[arrays.labels_BT >= 0].tolist()
    assert len(trained) == len(set(trained)) >= len(labels)
    assert len(labels) == len(set(labels))
    assert kind == "concat" or set(labels) == set(document_of) - seams
    assert sum(corpus.read(*place).new_tokens for place in all_rows(corpus)) == sum(lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_places_lead_back_to_the_tokens(folder, kind):
    """Caught mutations: the start of a piece counted from its block; a document's first token given to the one before.
    """
    corpus = open_train(folder, kind)
    shards, store = whole_shards(corpus), open_store(corpus.manifest, DataConfig(folder=str(folder)))
    for shard, row in all_rows(corpus):
        places, read = corpus.describe(shard, row), corpus.read(shard, row)
        tokens = np.concatenate([shards[shard][place.start : place.stop] for place in places])
        assert tokens.tolist() == read.tokens.tolist()
        for place in places:
            ends = store.open(shard).document_ends(place.block)
            begin = store.open(shard).table[: place.block]
            offset = sum(entry.tokens for entry in begin)
            first = offset + (int(ends[place.document - 1]) if place.document else 0)
            assert first <= place.start < place.stop <= offset + int(ends[place.document])


def test_rows_in_the_order_of_the_shards(folder):
    corpus = open_train(folder)
    assert [corpus.locate_unshuffled(number) for number in range(corpus.num_rows)] == all_rows(corpus)


def test_validation_is_never_rearranged(folder):
    assert open_train(folder, "bestfit", split="validation", fim_fraction=0.5, fim=FIM_WORDS).fim is None
    fim = open_train(folder, "bestfit", fim_fraction=0.5, fim=FIM_WORDS).fim
    assert (fim.prefix_id, fim.middle_id, fim.suffix_id, fim.eos_id, fim.fraction) == (3, 4, 5, 0, 0.5)


def test_fim_tokens_that_the_tokenizer_lacks(folder):
    message = r"corpus 'corpus' has fim_fraction = 0.5, and data.fim.prefix_token = '<\|fim_prefix\|>' isn't in .*json"
    with pytest.raises(DataError, match=message):
        open_train(folder, "bestfit", fim_fraction=0.5)


def test_rows_without_room_for_fim_tokens(folder):
    with pytest.raises(ConfigError, match=r"have no room for text; use a train.seq_len of 4 or more"):
        open_train(folder, "bestfit", 3, fim_fraction=0.5, fim=FIM_WORDS)
    assert open_train(folder, "bestfit", 4, fim_fraction=0.5, fim=FIM_WORDS).num_rows > 1000


def test_a_vocabulary_smaller_than_the_corpus(folder):
    with pytest.raises(DataError, match=r"model.vocab_size = 96 is smaller"):
        open_train(folder, vocab_size=96)


def test_a_split_without_labels(tmp_path):
    shards = write_shards(tmp_path / "train", [np.array([0])], np.dtype("<u2"), 10, 10)
    write_index(
        tmp_path / "train", shards, split="train", dtype="uint16", vocab_size=97, eos_id=0, text_bytes=0,
        tokenizer_file="tokenizer.json", tokenizer_sha256="0" * 64,
    )
    with pytest.raises(DataError, match=r"has 1 tokens in 1 shards: no row of two tokens"):
        open_train(tmp_path)


def test_counts_are_stored_and_used(folder):
    """The file holds what was counted; a later run believes it. Caught mutation: counts made anew each time."""
    corpus = open_train(folder, "bestfit")
    place = counts_place(corpus.manifest, corpus.packing)
    assert place.endswith(f"train/rows-bestfit-64-1-0-{corpus.manifest.index.table_sha256[:16]}.npy")
    assert np.load(place).tolist() == corpus.rows_per_shard.tolist()
    assert not list((folder / "train").glob("*.tmp"))
    store_counts(corpus.manifest, corpus.packing, corpus.rows_per_shard + 1)
    assert (open_train(folder, "bestfit").rows_per_shard == corpus.rows_per_shard + 1).all()


def test_counts_of_other_rows(folder):
    """A file that isn't of these shards is found when a shard is planned. Caught mutation: no comparison."""
    corpus = open_train(folder, "bestfit")
    store_counts(corpus.manifest, corpus.packing, corpus.rows_per_shard + 1)
    found = int(corpus.rows_per_shard[2])
    message = rf"shard-000002.tar has {found} rows .*says {found + 1}; .*data count"
    with pytest.raises(DataError, match=message):
        open_train(folder, "bestfit").read(2, 0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-3], "29 bytes of type int64"),
        (lambda content: b"", "not a .npy file"),
        (lambda content: content.replace(b"<i8", b"<f8"), "type float64"),
        (lambda content: content[:-8] + (1 << 40).to_bytes(8, "little"), r"1099511627776 rows in shard-000003.tar"),
        (lambda content: content[:-8] + bytes(8), r"0 rows in shard-000003.tar"),
    ],
)
def test_damaged_counts(folder, damage, message):
    corpus = open_train(folder, "none")
    path = folder / "train" / counts_place(corpus.manifest, corpus.packing).rpartition("/")[2]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=rf"{message}.*write it again with: megascale data count .* --packing none"):
        open_train(folder, "none")


def test_counts_where_nothing_can_be_written(folder, monkeypatch):
    """A folder of another user, or a full disk: counted, not stored. Caught mutation: the error let through."""
    expected = open_train(folder, "none", 50).rows_per_shard

    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr("megascale.data.row_counts.os.fsync", refuse)
    for path in (folder / "train").glob("rows-*"):
        path.unlink()
    assert open_train(folder, "none", 50).rows_per_shard.tolist() == expected.tolist()
    assert not list((folder / "train").glob("rows-*"))


def test_counts_of_a_corpus_elsewhere(folder, tmp_path):
    """Counting it would read all of it, so its counts come with it. Caught mutation: shards opened as local files."""
    cache = {"folder": str(tmp_path / "cache")}
    with serve(folder) as server:
        assert open_train(server.url, cache=cache).num_rows == open_train(folder).num_rows
        message = r"has no counts of the rows of packing = bestfit .*: megascale data count http.* --packing bestfit"
        with pytest.raises(DataError, match=message):
            open_train(server.url, "bestfit", cache=cache)
        local = open_train(folder, "bestfit")
        remote = open_train(server.url, "bestfit", cache=cache)
        assert remote.rows_per_shard.tolist() == local.rows_per_shard.tolist()
        assert remote.read(3, 1).tokens.tolist() == local.read(3, 1).tokens.tolist()


def test_batches_that_do_not_divide(folder):
    """Every size of a batch that grows is checked. Caught mutation: the first one only."""
    corpora = [open_train(folder, seq_len=24)]
    check_batches(corpora, BatchPlan((0, 5), (6, 12)), 2, 3)
    with pytest.raises(ConfigError, match=r"10 rows isn't a multiple of .* = 2 x 3 = 6; use 6 or 12 rows"):
        check_batches(corpora, BatchPlan((0, 5), (6, 10)), 2, 3)


def test_fewer_rows_than_a_step(folder, tmp_path):
    corpus = open_train(folder, seq_len=24)
    message = rf"{corpus.num_rows} rows of seq_len = 24, fewer than the 400 rows of one step; set .* to \d+ or less"
    with pytest.raises(DataError, match=message):
        check_batches([corpus], BatchPlan((0, 9), (40, 400)), 2, 1)
    with pytest.raises(DataError, match=r"lower train.micro_batch_size x dp = 400"):
        check_batches([corpus], constant_batch(400), 400, 1)
    other = open_train(make_corpus(tmp_path / "other", seed=1), seq_len=24)
    check_batches([corpus, other], constant_batch(400), 2, 1)
