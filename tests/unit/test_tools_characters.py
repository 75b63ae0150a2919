"""Corpora of characters: each character of the source is a token, and none that isn't there is lost without a word."""

import pytest
from rich.console import Console

from data_tools.build import build_corpus
from data_tools.build_summary import compare_recipes
from data_tools.corpora import find_source
from data_tools.settings import EOS_TOKEN, BuildSettings
from data_tools.tokenizer import character_tokenizer
from megascale.data.manifest import load_manifest
from megascale.data.tokenizer import encode_texts, load_tokenizer
from megascale.errors import DataError

TEXT = "To be, or not:\n\nthat is\tthe quëstion. 中\n\nWhether 'tis\n\nZ\n"


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "tokenizer.json"
    character_tokenizer([TEXT], ["<|x|>"]).save(str(path))
    return path


def test_each_character_is_one_token_and_comes_back(path):
    tokenizer = load_tokenizer(path)
    (ids,) = encode_texts(tokenizer, [TEXT])
    assert len(ids) == len(TEXT)
    assert tokenizer.decode(ids, skip_special_tokens=False) == TEXT
    assert tokenizer.get_vocab_size() == 2 + len(set(TEXT))
    assert [tokenizer.token_to_id(token) for token in (EOS_TOKEN, "<|x|>", *sorted(set(TEXT)))] == list(
        range(2 + len(set(TEXT))))


def test_an_unknown_character_is_refused_by_name(path):
    """Caught mutation: a BPE model without merges in place of the table of words, which drops what it doesn't know."""
    with pytest.raises(DataError, match=r"lacks '!', '\?'"):
        encode_texts(load_tokenizer(path), ["To be", "be?!"])


def test_the_vocabulary_is_of_both_splits(tmp_path):
    """Caught mutation: only the training split's characters, so that the other's can't be tokenized."""
    (tmp_path / "input.txt").write_text(TEXT * 3 + "\n\n".join(chr(0x400 + number) * 9 for number in range(40)))
    settings = BuildSettings(characters=True, validation_fraction=0.5)
    source = find_source(str(tmp_path / "input.txt"), (), "text", "\n\n")
    build_corpus(source, tmp_path / "corpus", settings, 1, Console(quiet=True))
    manifests = [load_manifest(str(tmp_path / "corpus"), split) for split in ("train", "validation")]
    assert {manifest.vocab_size for manifest in manifests} == {1 + len(set(TEXT)) + 40}
    assert all(manifest.num_documents > 5 for manifest in manifests)


def test_a_corpus_of_before_this_setting_is_the_same_without_it():
    assert compare_recipes({"seed": 0}, {"seed": 0, "characters": False}) == []
    assert compare_recipes({"seed": 0}, {"seed": 0, "characters": True}) == [
        "characters = False there, True asked"]
