"""Rows, table and verdict of the leak test, without a model."""

import io

import numpy as np
import pytest
from rich.console import Console

from megascale.train.leak_report import Counts, Finding, Leak, judge, report_table
from megascale.train.leak_rows import CHOICES, choose, pack_random, perturb

LAYERS = ["embedding", "blocks.0", "final_norm", "head"]
SAME = Finding(None, True, Counts(32, 0, 0, 0, 20, 12, 0, 12), None)
CLEAN = Finding("first", True, Counts(20, 12, 0, 12, 20, 12, 0, 12), None)
CONTROL = Finding("first", False, Counts(20, 12, 20, 12, 20, 12, 20, 12), None)
FORWARD = Finding("first", True, Counts(20, 12, 3, 12, 20, 12, 0, 12), Leak(1, 5, 0, 0, 12, 1, 14))
BACKWARD = Finding("last", True, Counts(20, 12, 0, 12, 20, 12, 4, 12), Leak(4, 5, 1, 12, 32, 0, 3))


@pytest.mark.parametrize("seq_len", [2, 3, 7, 64, 1000])
def test_rows_hold_several_documents_and_one_takes_half(seq_len):
    tokens_BT, documents_BT = pack_random(range(20), seq_len, vocab_size=50, seed=1)
    assert tokens_BT.shape == documents_BT.shape == (20, seq_len)
    for documents_T in documents_BT:
        numbers, lengths = np.unique(documents_T, return_counts=True)
        assert len(numbers) >= 2
        assert seq_len // 2 in lengths
        assert set(np.diff(documents_T)) <= {0, 1}


def test_a_row_is_a_function_of_its_number():
    several, one = (pack_random(numbers, 64, vocab_size=50, seed=1) for numbers in (range(5), [3]))
    for array, alone in zip(several, one, strict=True):
        np.testing.assert_array_equal(array[3:4], alone)


@pytest.mark.parametrize(("choice", "document"), zip(CHOICES, (0, 2, 3, 1), strict=True))
def test_every_token_of_the_chosen_document_changes_and_no_other(choice, document):
    documents_BT = np.array([[0, 0, 1, 1, 1, 1, 2, 3]])
    tokens_BT = np.array([[9, 1, 2, 9, 4, 5, 9, 9]])
    changed_BT = perturb(tokens_BT, choose(documents_BT, choice), vocab_size=10) != tokens_BT
    np.testing.assert_array_equal(changed_BT, documents_BT == document)


@pytest.mark.parametrize(("findings", "said"), [
    ([SAME, BACKWARD, FORWARD, CONTROL], (
        "document 0 of row 5 (columns 0 to 11) is seen by document 1: with other tokens in the one, column 14 of the"
        " other changes, first in the output of blocks.0. Don't train on this.")),
    ([SAME, CLEAN, BACKWARD, CONTROL], "the loss of document 1 of row 5 (columns 12 to 31) has a gradient at column 3"),
    ([SAME._replace(counts=SAME.counts._replace(others_changed=2)), FORWARD, CONTROL], "at 2 of 32 positions"),
    ([SAME, CLEAN._replace(counts=CLEAN.counts._replace(itself_changed=0)), CONTROL], "is blind under ring, tp2"),
    ([SAME, CLEAN, CONTROL._replace(counts=CLEAN.counts)], "is blind under ring, tp2"),
])
def test_what_is_wrong_is_said(findings, said):
    assert said in judge(findings, LAYERS, "ring, tp2")


def test_nothing_is_said_where_nothing_is_wrong():
    assert judge([SAME, CLEAN, CONTROL], LAYERS, "ring, tp2") is None
    assert judge([SAME, CLEAN], LAYERS, "ring, tp2") is None  # rows of a corpus, which may hold one document each


def test_the_table_has_a_line_for_each_comparison():
    console = Console(file=io.StringIO(), width=120)
    console.print(report_table([SAME, FORWARD, CONTROL], vocab_size=64))
    lines = [line.strip("│ ").split("│") for line in console.file.getvalue().splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in line] for line in lines] == [
        ["none", "32 x 64", "0 of 32", "0 of 0", "0 of 20", "12 of 12"],
        ["first", "32 x 64", "3 of 20", "12 of 12", "0 of 20", "12 of 12"],
        ["control", "32 x 64", "20 of 20", "12 of 12", "20 of 20", "12 of 12"],
    ]
