"""Fill in the middle: the same tokens in one of two orders, a function of the row's key alone."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.data.fim import Fim
from megascale.data.row import Row

PRE, MID, SUF, EOS = 101, 102, 103, 0
LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=8)


def make_fim(fraction=1.0, suffix_first_fraction=0.5):
    return Fim(PRE, MID, SUF, EOS, fraction, suffix_first_fraction)


def make_row(lengths, cut_last=False):
    """A row of documents of rising tokens, each ended by EOS; the last one may be cut."""
    pieces = [np.append(np.arange(1, length) % 100 + 1, EOS) for length in lengths]
    if cut_last:
        pieces[-1] = np.arange(1, lengths[-1] + 1) % 100 + 1
    return Row(np.concatenate(pieces).astype(np.uint16), np.cumsum(lengths).tolist(), sum(lengths))


def pieces_of(row):
    return [part.tolist() for part in np.split(row.tokens, row.ends[:-1])]


def restore(piece):
    """What a rearranged piece was before, by the definition of the two forms."""
    if PRE not in piece:
        return piece
    end = [EOS] if piece[-1] == EOS else []
    body = piece[: len(piece) - len(end)]
    assert body[0] == PRE
    suf, mid = body.index(SUF), body.index(MID)
    suffix, after = body[suf + 1 : mid], body[mid + 1 :]
    return body[1:suf] + after + suffix + end  # suffix first has nothing before SUF, its prefix after MID


@settings(max_examples=300, deadline=None)
@given(LENGTHS, st.integers(0, 2**64 - 1), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_the_text_can_be_restored(lengths, key, fraction, suffix_first_fraction, cut_last):
    """Each piece holds its own tokens and the three, in a form that gives the text back; the end-of-text token is last.

    Caught mutations: the end-of-text token cut into the suffix; prefix and middle exchanged in the suffix-first form;
    ends left as they were; `new_tokens` that counts the three.
    """
    row = make_row(lengths, cut_last)
    changed = make_fim(fraction, suffix_first_fraction).transform(row, key)
    assert changed.tokens.dtype == row.tokens.dtype
    assert changed.ends[-1] == len(changed.tokens)
    assert changed.new_tokens == row.new_tokens
    for before, after in zip(pieces_of(row), pieces_of(changed), strict=True):
        assert restore(after) == before
        assert after.count(EOS) == before.count(EOS) == int(after[-1] == EOS)
        assert len(after) - len(before) in (0, 3)


def test_equal_keys_give_equal_rows_and_others_others():
    """Caught mutations: numpy's generator in place of the key; one draw for all pieces of a row."""
    row = make_row([20] * 8)
    results = [make_fim().transform(row, key).tokens.tolist() for key in (5, 5, 6)]
    assert results[0] == results[1] != results[2]
    cuts = {tuple(piece) for piece in pieces_of(make_fim(1.0, 0.0).transform(row, 5))}
    assert len(cuts) >= 6


def test_shares():
    """Of 8,000 documents as many as asked for, within 4 standard deviations; and cuts spread over the whole text.

    Caught mutations: fraction and suffix_first_fraction exchanged; the same number drawn for both; cuts below half.
    """
    changed = [make_fim(0.3, 0.8).transform(make_row([41] * 8), key) for key in range(1000)]
    pieces = [piece for row in changed for piece in pieces_of(row) if PRE in piece]
    suffix_first = [piece for piece in pieces if piece[1] == SUF]  # and a few with an empty prefix
    assert abs(len(pieces) / 8000 - 0.3) < 0.021
    assert abs(len(suffix_first) / len(pieces) - 0.8) < 0.045
    suffixes = [piece.index(MID) - piece.index(SUF) - 1 for piece in pieces]
    assert abs(np.mean(suffixes) - 40 / 3) < 0.9  # two uniform cuts leave a third of the whole behind them


def test_nothing_is_rearranged_at_zero():
    row = make_row([5, 1, 9])
    assert make_fim(0.0).transform(row, 3).tokens.tolist() == row.tokens.tolist()


def test_the_two_forms():
    """Written out, for the reader and against a changed hash."""
    row = make_row([8])
    assert pieces_of(make_fim(1.0, 0.0).transform(row, 1)) == [[PRE, 2, 3, 4, 5, SUF, 7, 8, MID, 6, EOS]]
    assert pieces_of(make_fim(1.0, 1.0).transform(row, 1)) == [[PRE, SUF, 7, 8, MID, 2, 3, 4, 5, 6, EOS]]
