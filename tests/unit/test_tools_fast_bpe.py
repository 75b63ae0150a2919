"""The fast path: used where its ids are equal, and never to be seen in the result."""

import json
import re
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex as TokenizersRegex
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_tools.chunks import read_facts
from data_tools.corpora import cut_source, find_source
from data_tools.engine import choose_engine
from data_tools.fast_bpe import AWKWARD_TEXTS, FastBpe, UnknownKindError, find_disagreement
from data_tools.settings import EOS_TOKEN
from data_tools.tokenize import TokenizeJob, tokenize_chunk
from data_tools.tokenizer import train_tokenizer
from megascale.data.tokenizer import load_tokenizer, parse_tokenizer
from tests.support.corpus import make_text

GPT4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEXTS = ["def read(self):\n    return self.value\n", "class Reader:\n        value = 1\n", *AWKWARD_TEXTS] * 20


@pytest.fixture(scope="module")
def content():
    return train_tokenizer(TEXTS, 600, ["<|fim_prefix|>"]).to_str().encode()


@pytest.fixture(scope="module")
def engines(content):
    return FastBpe(content), parse_tokenizer(content, "")


def train_like_gpt4() -> bytes:
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(TokenizersRegex(GPT4_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence([split, byte_level]), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[EOS_TOKEN], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer.to_str().encode()


@settings(max_examples=300, deadline=None)
@given(text=st.text() | st.text("ab \n\t'<|>1", max_size=200))
def test_ids_are_those_of_tokenizers(engines, text):
    """Caught mutation: another regular expression for numbers."""
    fast, tokenizer = engines
    assert fast.encode(text).tolist() == tokenizer.encode(text, add_special_tokens=False).ids


def test_awkward_texts_agree_for_both_kinds_of_pre_tokenizer(content):
    for kind in (content, train_like_gpt4()):
        assert find_disagreement(FastBpe(kind), parse_tokenizer(kind, ""), AWKWARD_TEXTS) is None


def test_special_tokens_that_are_spelt_out_stay_text():
    """Also one of letters alone, which is a word to the pre-tokenizer; caught mutation: they are left in the ranks."""
    content = train_tokenizer(TEXTS, 600, ["fimmiddle"]).to_str().encode()
    for text in (EOS_TOKEN, "a fimmiddle b", "fimmiddle"):
        ids = FastBpe(content).encode(text)
        assert ids.min() > 1
        assert parse_tokenizer(content, "").decode(ids.tolist()) == text


def lower(facts):
    facts["normalizer"] = {"type": "Lowercase"}


def word_level(facts):
    facts["pre_tokenizer"] = {"type": "WhitespaceSplit"}


def prefix_space(facts):
    facts["pre_tokenizer"]["add_prefix_space"] = True


def dropout(facts):
    facts["model"]["dropout"] = 0.1


def plain_added(facts):
    facts["added_tokens"][1]["special"] = False


def without_a_byte(facts):
    del facts["model"]["vocab"]["!"]


def swapped_merges(facts):
    merges = facts["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lower, r"it has a normalizer \(Lowercase\)"),
        (word_level, r"its pre-tokenizer \['WhitespaceSplit'\] isn't one of GPT-2's kind"),
        (prefix_space, r"its pre-tokenizer \['ByteLevel'\]"),
        (dropout, r"its model is BPE \['dropout'\]"),
        (plain_added, r"it adds tokens that aren't special \(<\|fim_prefix\|>\)"),
        (without_a_byte, r"its vocabulary lacks 1 of the 256 bytes"),
        (swapped_merges, r"its ids don't rise in the order of its merges"),
    ],
)
def test_other_kinds_are_told_apart(content, change, message):
    facts = json.loads(content)
    change(facts)
    with pytest.raises(UnknownKindError, match=message):
        FastBpe(json.dumps(facts).encode())


@pytest.fixture
def job(tmp_path, content):
    source = find_source(str(make_text(tmp_path / "text")))
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    (tmp_path / "chunks").mkdir()
    return TokenizeJob(source, tmp_path / "chunks", path, str(tmp_path), 0, np.dtype("<u2"), use_fast=True)


def choose(job, allow_fast=True):
    return choose_engine(job.source, dict(enumerate(cut_source(job.source, 1000))), job.tokenizer_path, allow_fast)


def test_the_choice_says_why(job, monkeypatch):
    is_fast, reason = choose(job)
    assert is_fast
    assert re.fullmatch(r"tiktoken, its ids equal on 40 awkward texts and [23]\d documents of the source", reason)
    assert choose(job, allow_fast=False) == (False, "tokenizers, as asked")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tiktoken", None)
        assert choose(job) == (
            False, "tokenizers (no fast path: tiktoken isn't installed: pip install 'megascale[fast]')"
        )
    monkeypatch.setattr("data_tools.fast_bpe.GPT2_PATTERN", r"\s+|\S+")
    is_fast, reason = choose(job)
    assert not is_fast
    assert reason.startswith("tokenizers (no fast path: by tiktoken the text that begins with ")


def test_the_sample_is_of_the_source(job, monkeypatch):
    """Engines that agree on awkward texts and not on the source; caught mutation: the sample left out."""
    monkeypatch.setattr("data_tools.engine.AWKWARD_TEXTS", ("",))
    monkeypatch.setattr("data_tools.fast_bpe.GPT2_PATTERN", "(?s).")
    assert not choose(job).is_fast


def test_a_disagreement_on_the_way_changes_no_token(job, monkeypatch):
    """Caught mutation: the chunk not made again."""
    pieces = cut_source(job.source, 1 << 20)[0]
    tokenize_chunk(job, 0, pieces)
    tokenize_chunk(job._replace(use_fast=False), 1, pieces)
    for fault in (lambda self, text: np.zeros(3, np.uint32), raise_value_error):
        with monkeypatch.context() as patch:
            patch.setattr(FastBpe, "encode", fault)
            patch.setattr("data_tools.tokenize.RECHECK_EVERY", 4)
            tokenize_chunk(job, 2, pieces)
        assert re.search("becomes other ids|tiktoken can't take", read_facts(job.folder, 2).disagreement)
        for suffix in ("tokens", "documents.npy"):
            first, *others = [(job.folder / f"{number:06d}.{suffix}").read_bytes() for number in (0, 1, 2)]
            assert others == [first, first]
        assert read_facts(job.folder, 2).counts == read_facts(job.folder, 0).counts


def raise_value_error(self, text):
    raise ValueError("Max stack size exceeded for backtracking")


def test_a_million_spaces_fall_back(job):
    """tiktoken's regular expressions can't split them."""
    path = job.source.root / "spaces.txt"
    path.write_text(" " * 1_000_000)
    source = find_source(str(job.source.root))
    pieces = cut_source(source, 1 << 30)[0]
    tokenize_chunk(job._replace(source=source), 0, pieces)
    path.write_text(" " * 1_000_000 + "x")
    tokenize_chunk(job._replace(source=source), 1, pieces)
    assert read_facts(job.folder, 0).disagreement is None, "white space alone is no document"
    assert "can't take a text" in read_facts(job.folder, 1).disagreement


def test_loaded_tokenizers_are_known_by_their_content(job, content):
    """Two builds in one process; caught mutation: `cached_tokenizer` by path alone."""
    pieces = cut_source(job.source, 1 << 20)[0]
    job = job._replace(use_fast=False)
    tokenize_chunk(job, 0, pieces)
    train_tokenizer(TEXTS, 300).save(str(job.tokenizer_path))
    tokenize_chunk(job._replace(tokenizer_sha256="other"), 1, pieces)
    first, second = [np.fromfile(job.folder / f"{number:06d}.tokens", "<u2") for number in (0, 1)]
    assert first.max() >= 300 > second.max()
    assert load_tokenizer(job.tokenizer_path).decode(second[second > 0].tolist())
