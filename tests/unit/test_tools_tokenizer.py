"""The tokenizer: any text comes back, no text becomes a special token, training is reproducible."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.settings import EOS_TOKEN
from data_tools.tokenize import encode_slow, hash_text
from data_tools.tokenizer import find_eos_id, take_tokenizer, train_tokenizer
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
    (tokens,) = encode_slow(load_tokenizer(path), [text])
    assert not (tokens == 0).any()
    assert load_tokenizer(path).decode(tokens.tolist()) == text


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


def test_special_tokens_follow_the_end_of_text(path):
    tokenizer = train_tokenizer(TEXTS, 300, ["<|fim_prefix|>", "<|fim_suffix|>"])
    assert [tokenizer.token_to_id(token) for token in (EOS_TOKEN, "<|fim_prefix|>", "<|fim_suffix|>")] == [0, 1, 2]
    with pytest.raises(DataError, match=r"--vocab-size 258 is too small .* need 259 entries"):
        train_tokenizer(TEXTS, 258, ["<|fim_prefix|>", "<|fim_suffix|>"])


def test_a_tokenizer_that_exists_is_taken_as_it_is(path, tmp_path):
    assert take_tokenizer(str(path), EOS_TOKEN, ()) == path.read_bytes()
    with pytest.raises(DataError, match=r"no special token <\|fim_prefix\|>; it has <\|endoftext\|>: name one"):
        take_tokenizer(str(path), EOS_TOKEN, ("<|fim_prefix|>",))
    with pytest.raises(DataError, match=r"has no token '</s>'"):
        take_tokenizer(str(path), "</s>", ())
    with pytest.raises(DataError, match=r"no tokenizer at .*none.json"):
        take_tokenizer(str(tmp_path / "none.json"), EOS_TOKEN, ())


def test_tokenizer_of_the_hub(path, monkeypatch):
    monkeypatch.setattr("data_tools.tokenizer.Tokenizer", FakeHub)
    FakeHub.path = path
    content = take_tokenizer("hub:some/name", EOS_TOKEN, ())
    assert load_tokenizer(path).to_str(pretty=True).encode() == content
    with pytest.raises(DataError, match=r"hub:other can't be fetched \(404\); give the path of a"):
        take_tokenizer("hub:other", EOS_TOKEN, ())


class FakeHub:
    """Stands for the class that fetches: one tokenizer, no network."""

    @classmethod
    def from_pretrained(cls, name):
        if name != "some/name":
            raise Exception("404")
        return load_tokenizer(cls.path)


def test_text_hash_is_uniform_and_pinned():
    values = np.array([hash_text(str(number).encode()) for number in range(2000)]) / 2**64
    assert abs(values.mean(0) - 0.5).max() < 0.03
    assert hash_text(b"abc") == (3138212647195331279, 1619088549062707489)
