"""Rows cut from a shard: every token but the first is a label once, after the token before it."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.data.packing import IGNORED_LABEL, count_rows, pack_rows, row_token_range


@settings(max_examples=500, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40))
def test_every_token_is_a_label_once(num_tokens, seq_len):
    """Caught mutation: ceil(T / L) rows, which gives a row without labels when L divides T - 1."""
    tokens = np.arange(num_tokens)
    ranges = [row_token_range(row, seq_len, num_tokens) for row in range(count_rows(num_tokens, seq_len))]
    tokens_BT, labels_BT = pack_rows([tokens[start:stop] for start, stop in ranges], seq_len, pad_id=-7)
    has_label = labels_BT != IGNORED_LABEL
    assert labels_BT[has_label].tolist() == list(range(1, num_tokens))
    assert tokens_BT[has_label].tolist() == list(range(num_tokens - 1))
    assert (tokens_BT[~has_label] == -7).all()
    assert has_label.any(axis=1).all()


def test_an_empty_row_has_no_label():
    tokens_BT, labels_BT = pack_rows([(), np.array([3, 4])], seq_len=2, pad_id=0)
    assert tokens_BT.tolist() == [[0, 0], [3, 0]]
    assert labels_BT.tolist() == [[IGNORED_LABEL] * 2, [4, IGNORED_LABEL]]
    assert tokens_BT.dtype == labels_BT.dtype == np.int64
