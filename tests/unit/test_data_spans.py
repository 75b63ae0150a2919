"""Span corruption and pairs: sources and targets of rows, as pure functions of the row and its key."""

import numpy as np
import pytest

from megascale.config.load import parse_config
from megascale.config.target import fill_spans, plan_spans, span_plan, target_len
from megascale.config.validate import check_config
from megascale.data.pairs import Pairs
from megascale.data.permutation import derive_key
from megascale.data.row import Row
from megascale.data.spans import SpanCorruption, cut_randomly
from megascale.errors import ConfigError, DataError

END, SENTINELS = 0, list(range(999, 899, -1))


def corruption(seq_len: int = 128, separates: bool = False) -> SpanCorruption:
    plan = fill_spans(seq_len, 0.15, 3.0)
    return SpanCorruption(seq_len, plan.target, plan.text, 0.15, 3.0, END, SENTINELS, separates)


def text_row(size: int, ends: list[int] | None = None) -> Row:
    return Row(np.arange(1, size + 1, dtype=np.uint16), ends or [size], size)


def restore(source: list[int], target: list[int]) -> list[int]:
    """The text of a source and a target, by putting each span in the place of its sentinel."""
    spans, text = {}, []
    for token in target[:-1]:
        if token in SENTINELS:
            spans[token] = current = []
        else:
            current.append(token)
    for token in source[:-1]:
        text += spans.pop(token) if token in SENTINELS else [token]
    assert not spans
    assert source[-1] == target[-1] == END
    return text


@pytest.mark.parametrize("seq_len", [16, 64, 128, 512])
def test_full_rows_fill_their_source(seq_len):
    """T5's own 512: 568 tokens of text, 114 positions of target (`random_spans_helper` of the published code)."""
    plan = fill_spans(seq_len, 0.15, 3.0)
    assert plan.source <= seq_len < plan_spans(plan.text + 1, 0.15, 3.0).source
    if seq_len == 512:
        assert (plan.text, plan.target) == (568, 114)


@pytest.mark.parametrize("size", [2, 3, 5, 40, 139])
def test_source_and_target_together_are_the_text(size):
    objective = corruption()
    keys = derive_key(7, np.arange(20))
    arrays = objective.assemble([text_row(size)] * 20, keys)
    plan = plan_spans(size, 0.15, 3.0)
    for number in range(20):
        source, labels = arrays.source_BS[number, : plan.source].tolist(), arrays.labels_BT[number]
        target = labels[: plan.target].tolist()
        assert restore(source, target) == list(range(1, size + 1))
        assert (arrays.source_BS[number, plan.source :] == END).all()
        assert (labels[plan.target :] == -100).all()
        assert arrays.tokens_BT[number, : plan.target].tolist() == [END, *target[:-1]]
        assert sum(token in SENTINELS for token in target) == plan.spans
        assert source[0] not in SENTINELS, "a text begins with a token that stays"
    assert size < 100 or len({arrays.source_BS[number].tobytes() for number in range(20)}) == 20


def test_a_row_depends_on_its_key_alone():
    """Seen to catch: one generator for all rows of a call."""
    objective, keys = corruption(), derive_key(1, np.arange(6))
    rows = [text_row(139 - number) for number in range(6)]
    whole = objective.assemble(rows, keys)
    for number in range(6):
        alone = objective.assemble([rows[number]], keys[number : number + 1])
        for all_rows, one in zip(whole, alone, strict=True):
            assert all_rows is None or np.array_equal(all_rows[number : number + 1], one)


def test_spans_lie_everywhere_alike():
    """Each token but those at the ends is hidden with the share that was asked for."""
    objective, count = corruption(), 2000
    arrays = objective.assemble([text_row(139)] * count, derive_key(3, np.arange(count)))
    times = np.bincount(arrays.labels_BT[(arrays.labels_BT > 0) & (arrays.labels_BT < 900)], minlength=140)[1:]
    share = times / count
    assert abs(share.mean() - 21 / 139) < 1e-9
    assert share[20:-20].min() > 0.11
    assert share[20:-20].max() < 0.2


def test_documents_are_kept_apart():
    """A target sees its own document's source, and a further document begins anew.

    Seen to catch: the documents of the text taken for those of the source.
    """
    row = text_row(139, [50, 90, 139])
    arrays = corruption(separates=True).assemble([row], derive_key(5, np.arange(1)))
    plan = plan_spans(139, 0.15, 3.0)
    source, documents = arrays.source_BS[0, : plan.source - 1], arrays.source_documents_BS[0]
    of_token = np.repeat([0, 1, 2], [50, 40, 49])
    for token, document in zip(source, documents, strict=False):
        assert token >= 900 or of_token[token - 1] == document
    in_source = dict(zip(source.tolist(), documents.tolist(), strict=False))
    for token, document in zip(arrays.labels_BT[0], arrays.documents_BT[0], strict=True):
        assert token < 900 or in_source[token] == document
    assert (np.diff(documents) >= 0).all()
    assert documents[-1] == 3
    starts = np.flatnonzero(np.diff(arrays.documents_BT[0], prepend=-1))
    assert len(starts) == 3
    assert (arrays.tokens_BT[0, starts] == END).all()
    assert set(arrays.documents_BT[0].tolist()) <= set(documents.tolist())
    together = corruption().assemble([row], derive_key(5, np.arange(1)))
    assert (together.documents_BT == 0).all()
    assert set(together.source_documents_BS[0].tolist()) <= {0, 1}


def test_rows_without_text_have_no_labels():
    arrays = corruption().assemble([None, text_row(1)], derive_key(1, np.arange(2)))
    assert (arrays.labels_BT == -100).all()
    assert set(arrays.documents_BT.ravel()) <= set(arrays.source_documents_BS.ravel()), "each query has a key"


def test_parts_are_drawn_alike():
    parts = [tuple(cut_randomly(5, 3, derive_key(key))) for key in range(3000)]
    counts = {part: parts.count(part) for part in set(parts)}
    assert len(counts) == 6
    assert min(counts.values()) > 400


def test_pairs_are_taken_apart_and_cut():
    objective = Pairs(seq_len=4, target_len=3, end_id=END)
    rows = [Row(np.array(tokens, np.uint16), [len(tokens)], len(tokens)) for tokens in (
        [5, 6, END, 7, END], [1, 2, 3, 4, 5, END, 6, 7, 8, END])]
    arrays = objective.assemble([*rows, None], np.zeros(3, np.uint64))
    assert arrays.source_BS.tolist() == [[5, 6, END, END], [1, 2, 3, END], [END] * 4]
    assert arrays.source_documents_BS.tolist() == [[0, 0, 0, 1], [0] * 4, [0] * 4]
    assert arrays.tokens_BT.tolist() == [[END, 7, END], [END, 6, 7], [END] * 3]
    assert arrays.labels_BT.tolist() == [[7, END, -100], [6, 7, END], [-100] * 3]
    with pytest.raises(DataError, match="megascale data pairs"):
        objective.assemble([Row(np.array([1, 2, END], np.uint16), [3], 3)], np.zeros(1, np.uint64))


def config_of(**sections):
    values = {
        "run": {"name": "x", "folder": "x"},
        "model": {"family": "t5", "num_layers": 2, "d_model": 32, "num_heads": 4, "vocab_size": 61, "max_seq_len": 64},
        "data": {"folder": "x"}, "train": {"seq_len": 64, "global_batch_tokens": 256, "max_steps": 4,
                                           "micro_batch_size": 2},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1}, "precision": {"dtype": "fp32"}, "parallel": {},
        "evaluate": {"interval_steps": 2}, "checkpoint": {"interval_steps": 2},
    }
    return parse_config({name: section | sections.get(name, {}) for name, section in values.items()}, source="x")


@pytest.mark.parametrize(("sections", "ranks", "words"), [
    ({"parallel": {"cp": 2}}, 2, "parallel.cp = 2 with model.family = t5"),
    ({"parallel": {"pp": 2, "stage_layers": [1, 3]}}, 2, "parallel.stage_layers"),
    ({"parallel": {"tp": 4}, "data": {"objective": {"target_len": 18}}}, 4, "use a data.objective.target_len of 20"),
    ({"data": {"objective": {"target_len": 10}}}, 1, "use 14 or more"),
    ({"data": {"objective": {"kind": "pairs"}}}, 1, "packing: none"),
    ({"train": {"seq_len": 32}, "data": {"objective": {"target_len": 65}}}, 1, "model.max_seq_len = 64"),
    ({"parallel": {"pp": 8}, "train": {"global_batch_tokens": 2048}}, 8, "can't fill 8 stages"),
])
def test_what_cannot_work_is_refused_by_name(sections, ranks, words):
    with pytest.raises(ConfigError, match="(?s)" + words.replace(".", r"\.")):
        check_config(config_of(**sections), ranks, None)


def test_the_length_of_targets():
    assert (span_plan(config_of()).target, target_len(config_of())) == (14, 16)
    assert target_len(config_of(data={"packing": "none", "objective": {"kind": "pairs"}})) == 64
    assert target_len(config_of(model={"family": "gpt2"})) == 0
