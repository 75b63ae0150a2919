"""`megascale data inspect FOLDER`: rows of a corpus, decoded, with their source."""

import pytest
from tokenizers import Tokenizer
from typer.testing import CliRunner

from data_tools.cli import app
from data_tools.inspect import describe_corpus_row
from megascale.data.manifest import load_manifest
from megascale.data.shards import map_shard
from megascale.errors import DataError
from tests.support.corpus import make_corpus
from tests.support.streams import open_test_stream, stream_config


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("inspect") / "corpus")


@pytest.mark.parametrize("packing", ["concat", "bestfit", "none"])
@pytest.mark.parametrize("number", [0, 3, 41])
def test_each_piece_is_the_text_at_the_place_it_names(corpus, packing, number):
    """Caught mutations: places counted from the block; pieces of the row after."""
    shown = describe_corpus_row(corpus, "train", number, 50, packing, None)
    title, *lines = shown.splitlines()
    assert title.startswith(f"row {number}: corpus corpus, epoch 0, shard-")
    manifest = load_manifest(str(corpus), "train")
    shard = map_shard(manifest, int(title.split("shard-")[1][:6]))
    tokenizer = Tokenizer.from_file(str(corpus / "tokenizer.json"))
    heads, texts = lines[::2], lines[1::2]
    assert len(heads) == len(texts) > 0
    for head, text in zip(heads, texts, strict=True):
        words = head.replace(",", "").split()
        block, document, start, stop = (int(words[at]) for at in (2, 4, 6, 8))
        tokens = shard.read(start, stop + 1)
        assert text == tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
        first = int(shard.document_ends(block)[document - 1]) if document else 0
        begin = sum(entry.tokens for entry in shard.table[:block])
        assert begin + first <= start <= stop < begin + int(shard.document_ends(block)[document])
        assert ("the document goes on" in head) == (int(tokens[-1]) != 0)


def test_a_seed_numbers_rows_as_a_run_does(corpus):
    """Caught mutation: another name of the corpus, which its shuffle depends on."""
    config = stream_config(corpus, data={"num_lanes": 64, "window_rows": 4096}, seed=5)
    stream = open_test_stream(config)
    for number in (0, 17, 1000):
        _, epoch, shard, row = (int(array[0]) for array in stream.order.locate([number]))
        shown = describe_corpus_row(corpus, "train", number, 24, "concat", 5)
        assert shown.startswith(f"row {number}: corpus corpus, epoch {epoch}, shard-{shard:06d}.tar, row {row}:")


@pytest.mark.parametrize("number", [-1, 9999])
def test_a_row_that_is_not_there_is_refused(corpus, number):
    with pytest.raises(DataError, match=rf"--row {number} is not in 0 .. \d+, the rows of .*train"):
        describe_corpus_row(corpus, "train", number, 50, "concat", None)


def test_the_command_shows_a_row_of_the_validation_split(corpus):
    options = ["--row", "2", "--seq-len", "40", "--packing", "bestfit", "--split", "validation"]
    result = CliRunner().invoke(app, ["inspect", str(corpus), *options])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("row 2: corpus corpus, epoch 0, shard-000000.tar, row 2: ")
