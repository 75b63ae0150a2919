"""The tokenizer: any text comes back, no text becomes a special token, training is reproducible."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.corpora import Document
from data_tools.settings import EOS_TOKEN
from data_tools.tokenize import hash_text, tokenize_batch, tokenize_documents
from data_tools.tokenizer import find_eos_id, train_tokenizer
from megascale.data.tokenizer import load_tokenizer
from megascale.errors import DataError

TEXTS = ["def read(self):\n    return self.value\n", "class Reader:\n    value = 1\n"] * 20


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(TEXTS, 300).save(str(path))
    return path


@settings(max_examples=300, deadline=None)
@given(text=st.text())
def test_any_text_comes_back(path, text):
    tokenizer = load_tokenizer(path)
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_text_never_becomes_a_special_token(path):
    """Caught mutation: `encode_special_tokens` left False; the text would end its own document."""
    text = f"a{EOS_TOKEN}b"
    batch = tokenize_batch(path, 0, [Document(text, 0)])
    assert np.flatnonzero(batch.tokens == 0).tolist() == [len(batch.tokens) - 1]
    assert load_tokenizer(path).decode(batch.tokens[:-1].tolist()) == text


def test_training_is_reproducible():
    assert train_tokenizer(TEXTS, 300).to_str() == train_tokenizer(iter(TEXTS), 300).to_str()


def test_end_of_text_is_token_0(path):
    tokenizer = load_tokenizer(path)
    assert find_eos_id(tokenizer, EOS_TOKEN, path) == 0
    with pytest.raises(DataError, match=r"has no token '</s>' to end a document with; name its own by --eos-token"):
        find_eos_id(tokenizer, "</s>", path)


def test_vocabulary_too_small_for_bytes():
    with pytest.raises(DataError, match=r"--vocab-size 256 is too small .* need 257 entries; use 257 or more"):
        train_tokenizer(TEXTS, 256)


def test_missing_or_damaged_tokenizer(tmp_path, path):
    with pytest.raises(DataError, match=r"no tokenizer at .*gone.json; train one with: megascale data tokenizer"):
        load_tokenizer(tmp_path / "gone.json")
    (tmp_path / "cut.json").write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"cut.json isn't a tokenizer file"):
        load_tokenizer(tmp_path / "cut.json")


def test_workers_give_the_same_tokens_in_the_same_order(path, monkeypatch):
    """Many batches, two processes; caught mutation: the last submitted result taken first."""
    monkeypatch.setattr("data_tools.tokenize.BATCH_BYTES", 1 << 17)
    documents = [Document(TEXTS[number % 2] * (1 + 977 * number % 3001), 1) for number in range(60)]
    alone = list(tokenize_documents(documents, path, 0, workers=1))
    shared = list(tokenize_documents(documents, path, 0, workers=2))
    assert len(alone) == len(shared) > 8
    for a, b in zip(alone, shared, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert sum(batch.source_bytes for batch in alone) == 60


def test_text_hash_is_uniform_and_pinned():
    values = np.array([hash_text(str(number)) for number in range(2000)])
    assert abs(values.mean(0) - 0.5).max() < 0.03
    assert hash_text("abc") == (0.1701228484905332, 0.08777096611700953)
