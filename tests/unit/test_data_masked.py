"""Masked language modelling: what is hidden follows from the row and the seed alone, in the shares of the paper."""

import hashlib

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from data_tools.build import build_corpus
from data_tools.corpora import find_source
from data_tools.settings import BuildSettings
from megascale.config.derive import derive
from megascale.config.load import parse_config
from megascale.data.loader import Loader, evaluation_batches
from megascale.data.masked import CHANGED_FRACTION, MASKED_FRACTION, Masked
from megascale.data.objectives import IGNORED_LABEL, PAIR_LABELS
from megascale.data.permutation import derive_key
from megascale.data.row import Row
from megascale.data.stream import open_stream, open_validation
from megascale.data.words import build_word_table
from megascale.errors import DataError
from tests.support.bert_rows import NUM_SPECIAL, TOKENS, random_row, word_table
from tests.support.corpus import QUIET, make_text

SEQ_LEN, VOCAB = 64, 61
SPECIAL = ("[CLS]", "[SEP]", "[MASK]")


def masked(**options) -> Masked:
    return Masked(SEQ_LEN, TOKENS, word_table(VOCAB), **{"fraction": 0.15} | options)


def assemble(objective: Masked, count: int, seed: int = 1):
    rows = [random_row(objective.row_tokens, VOCAB, number) for number in range(count)]
    return rows, objective.assemble(rows, derive_key(seed, np.arange(count)))


@pytest.mark.parametrize("has_whole_words", [False, True])
def test_shares_are_those_of_the_paper(has_whole_words):
    """Seen to catch: [CLS] and [SEP] hidden, all hidden tokens masked, a random token from the special ones."""
    objective = masked(has_whole_words=has_whole_words)
    rows, arrays = assemble(objective, 1200)
    is_label_BT = arrays.labels_BT >= 0
    expected = sum(max(1, round(0.15 * len(row.tokens))) for row in rows)
    # A word that would be one too many is left out, which a row's last words may all be.
    assert 0.97 * expected <= is_label_BT.sum() <= expected
    assert has_whole_words or is_label_BT.sum() == expected
    hidden, labels = arrays.tokens_BT[is_label_BT], arrays.labels_BT[is_label_BT]
    is_mask, is_kept = hidden == TOKENS.mask_id, hidden == labels
    assert is_mask.mean() == pytest.approx(MASKED_FRACTION, abs=0.01)
    share_by_chance = (CHANGED_FRACTION - MASKED_FRACTION) / (VOCAB - NUM_SPECIAL)
    assert is_kept.mean() == pytest.approx(1 - CHANGED_FRACTION + share_by_chance, abs=0.01)
    assert (hidden[~is_mask] >= NUM_SPECIAL).all()
    assert len(np.unique(hidden[~is_mask & ~is_kept])) > 50, "any token of text"
    assert (labels >= NUM_SPECIAL).all()
    for row, tokens_T, labels_T, documents_T in zip(
        rows, arrays.tokens_BT, arrays.labels_BT, arrays.documents_BT, strict=True
    ):
        text_T = np.where(labels_T >= 0, labels_T, tokens_T)
        size = len(row.tokens) + 2
        assert text_T[:size].tolist() == [TOKENS.cls_id, *row.tokens, TOKENS.sep_id]
        assert (tokens_T[size:] == TOKENS.pad_id).all()
        assert documents_T.tolist() == [0] * size + [1] * (SEQ_LEN - size)


def test_words_are_hidden_whole():
    """Seen to catch: pieces chosen one by one."""
    _, arrays = assemble(masked(has_whole_words=True), 200)
    text_BT = np.where(arrays.labels_BT >= 0, arrays.labels_BT, arrays.tokens_BT)
    goes_on_BT = (text_BT % 3 == 0) & (text_BT >= NUM_SPECIAL)
    goes_on_BT[:, 1:] &= text_BT[:, :-1] >= NUM_SPECIAL
    is_label_BT = arrays.labels_BT >= 0
    inside = goes_on_BT[:, 1:]
    assert inside.sum() > 1000
    assert (is_label_BT[:, 1:][inside] == is_label_BT[:, :-1][inside]).all()
    _, alone = assemble(masked(), 200)
    is_label_BT = alone.labels_BT >= 0
    assert (is_label_BT[:, 1:][inside] != is_label_BT[:, :-1][inside]).any()


def test_a_row_does_not_depend_on_the_others():
    objective = masked(pair_task="nsp", has_whole_words=True)
    rows, together = assemble(objective, 12)
    keys = derive_key(1, np.arange(12))
    for number in range(12):
        alone = objective.assemble([rows[number]], keys[number : number + 1])
        for mine, ours in zip(alone, together, strict=True):
            assert mine is None or (mine[0] == ours[number]).all()
    other = objective.assemble(rows, derive_key(2, np.arange(12)))
    assert (other.labels_BT != together.labels_BT).any(axis=1).all(), "another seed hides others"


@pytest.mark.parametrize("task", ["sop", "nsp"])
def test_pairs_are_cut_within_the_longest_piece(task):
    """Seen to catch: the two labels swapped, segments counted from the wrong place, the pair of one row in all rows."""
    objective = masked(pair_task=task)
    rows, arrays = assemble(objective, 400)
    labels = arrays.labels_BT[:, 0]
    assert set(labels.tolist()) == set(PAIR_LABELS)
    assert (labels == PAIR_LABELS[0]).mean() == pytest.approx(0.5, abs=0.07)
    for row, tokens_T, labels_T, segments_T in zip(
        rows, arrays.tokens_BT, arrays.labels_BT, arrays.segments_BT, strict=True
    ):
        text_T = np.where(labels_T >= 0, labels_T, tokens_T)
        first_sep = int(np.flatnonzero(text_T == TOKENS.sep_id)[0])
        size = len(row.tokens)
        first, second = text_T[1:first_sep], text_T[first_sep + 1 : size + 2]
        assert text_T[size + 2] == TOKENS.sep_id
        assert segments_T.tolist() == [0] * (first_sep + 1) + [1] * (size + 2 - first_sep) + [0] * (SEQ_LEN - size - 3)
        own = row.tokens.tolist()
        if labels_T[0] == PAIR_LABELS[0]:
            assert [*first, *second] == own
            assert row.ends[0] < len(first) < size, "the longest piece is the second, two thirds of the row"
        elif task == "sop":
            assert [*second, *first] == own
        else:
            assert own[: len(first)] == first.tolist()
            assert row.partner[-len(second) :].tolist() == second.tolist()


def test_rows_that_are_none_or_too_short_have_no_pair():
    objective = masked(pair_task="nsp")
    arrays = objective.assemble([None, Row(np.array([9]), [1], 1)], derive_key(1, np.arange(2)))
    assert arrays.labels_BT[0].tolist() == [IGNORED_LABEL] * SEQ_LEN
    assert arrays.tokens_BT[0].tolist() == [TOKENS.pad_id] * SEQ_LEN
    assert arrays.labels_BT[1].tolist() == [IGNORED_LABEL, 9, *[IGNORED_LABEL] * (SEQ_LEN - 2)]


def test_documents_are_kept_apart_where_asked():
    _, arrays = assemble(masked(keeps_documents=True), 3)
    for number in range(3):
        row = random_row(SEQ_LEN - 2, VOCAB, number)
        size, cut = len(row.tokens) + 2, 1 + row.ends[0]
        assert arrays.documents_BT[number].tolist() == [0] * cut + [1] * (size - cut) + [2] * (SEQ_LEN - size)


def starts(tokenizer: Tokenizer, text: str) -> list[str]:
    """The words that a text's tokens make."""
    encoded = tokenizer.encode(text, add_special_tokens=False)
    table = build_word_table(tokenizer, tokenizer.get_vocab_size())
    words: list[str] = []
    for token, begins in zip(encoded.tokens, table.word_starts(np.array(encoded.ids)), strict=True):
        words = [*words, token] if begins else [*words[:-1], words[-1] + token]
    return words


def test_words_of_byte_level_tokens():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=262, special_tokens=["<|end|>", "[MASK]"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False)
    tokenizer.train_from_iterator(["self self self selfish"], trainer)
    assert starts(tokenizer, "def self_x(größe):\n x1") == [
        "def", "Ġself_x", "(", "größe".encode().decode("latin-1").replace("\x9f", "Ł"), ")", ":", "Ċ", "Ġx1"]
    table = build_word_table(tokenizer, 300)
    assert not table.is_text_V[[0, 1]].any()
    assert not table.is_text_V[tokenizer.get_vocab_size() :].any()


def test_words_of_marked_pieces_and_of_whole_words():
    vocabulary = {"[UNK]": 0, "un": 1, "##known": 2, "##s": 3, "word": 4}
    pieces = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert starts(pieces, "unknown words") == ["un##known", "word##s"]
    whole = Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert starts(whole, "a b a") == ["a", "b", "a"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masked")
    source = make_text(folder / "text")
    settings = BuildSettings(
        vocab_size=300, validation_fraction=0.2, shard_tokens=2048, block_tokens=512, special_tokens=SPECIAL)
    build_corpus(find_source(str(source)), folder / "corpus", settings, 1, QUIET)
    return folder / "corpus"


def run_config(corpus, **objective):
    has_pairs = objective.get("pair_task", "none") != "none"
    return parse_config({
        "run": {"name": "masked", "folder": "unused", "seed": 1},
        "model": {"family": "bert", "num_layers": 1, "d_model": 8, "num_heads": 1, "vocab_size": 300,
                  "max_seq_len": 24, "pair_head": has_pairs},
        "data": {"folder": str(corpus), "num_lanes": 8, "window_rows": 20, "objective": objective},
        "train": {"seq_len": 24, "micro_batch_size": 1, "global_batch_tokens": 288, "max_steps": 10},
        "optimizer": {"learning_rate": 1e-3}, "evaluate": {"interval_steps": 10}, "checkpoint": {"interval_steps": 10},
    }, source="masked")


def digests(config, num_replicas: int, first_step: int = 0) -> list[str]:
    """A digest of all rows of each step, by row number, as the replicas of a run make them."""
    derived = derive(config, num_replicas)
    found = []
    for step in range(first_step, 6):
        rows = {}
        for replica in range(num_replicas):
            loader = Loader(open_stream(config, derived), derived.batches, 1, replica, num_replicas)
            for batch in loader.make_step(step).micro_batches:
                values = [batch.tokens_BT, batch.labels_BT, batch.documents_BT, batch.segments_BT]
                rows[int(batch.row_numbers_B)] = b"".join(value.numpy().tobytes() for value in values)
        found.append(hashlib.sha256(b"".join(rows[number] for number in sorted(rows))).hexdigest())
    return found


def test_rows_are_the_same_for_any_layout_and_after_a_resumption(corpus):
    """Seen to catch: the partner taken from the rows of the same replica."""
    config = run_config(corpus, pair_task="nsp", whole_word=True)
    alone = digests(config, 1)
    assert len(set(alone)) == 6
    assert digests(config, 2) == digests(config, 4) == alone
    assert digests(config, 2, first_step=3) == alone[3:]


def test_validation_hides_the_same_in_each_pass(corpus):
    config = run_config(corpus, pair_task="nsp")
    (split,), objective = open_validation(config), open_stream(config, derive(config, 1)).objective
    passes = [
        {int(number): batch.labels_BT[at].tolist() for replica in range(replicas)
         for batch in evaluation_batches(split, objective, 2, replica, replicas)
         for at, number in enumerate(batch.row_numbers_B) if number >= 0}
        for replicas in (1, 1, 2)
    ]
    assert passes[0] == passes[1] == passes[2]
    assert {labels[0] for labels in passes[0].values()} >= set(PAIR_LABELS)


def test_a_tokenizer_without_mask_is_refused_with_the_remedy(corpus):
    config = run_config(corpus, mask_token="<mask>", cls_token="<s>")
    with pytest.raises(DataError, match=r"--special-token '<mask>' --special-token '<s>'"):
        open_stream(config, derive(config, 1))
    with pytest.raises(DataError, match="three different tokens"):
        open_stream(run_config(corpus, cls_token="[SEP]"), derive(config, 1))
