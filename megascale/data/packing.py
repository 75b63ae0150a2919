"""How the tokens of a shard become rows: documents laid end to end and cut every seq_len tokens.

Row q of a shard has the inputs [q L, q L + L) and reads one token more, which is only a label: each token of a shard
but its first is a label once and only once. Rows never cross shards, so a damaged shard touches its own rows only.
"""

import numpy as np

IGNORED_LABEL = -100
"""A position without label: padding. torch's cross-entropy ignores this value by default."""


def count_rows(num_tokens: int, seq_len: int) -> int:
    """Rows of a shard of `num_tokens` tokens: as many as have at least one label."""
    return max(0, -(-(num_tokens - 1) // seq_len))


def row_token_range(row: int, seq_len: int, num_tokens: int) -> tuple[int, int]:
    """The tokens [start, stop) of a shard that a row reads: seq_len + 1, fewer in the shard's last row."""
    start = row * seq_len
    return start, min(start + seq_len + 1, num_tokens)


def pack_rows(rows: list[np.ndarray], seq_len: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Lays rows out as a batch of inputs and labels, shifted by one.

    Args:
        rows: per row the tokens that it reads, at most seq_len + 1; an empty one gives a row without labels.
        seq_len: positions per row.
        pad_id: input on positions without token.

    Returns:
        tokens_BT and labels_BT, int64; labels are -100 on padding.
    """
    tokens_BT = np.full((len(rows), seq_len), pad_id, np.int64)
    labels_BT = np.full((len(rows), seq_len), IGNORED_LABEL, np.int64)
    for number, row in enumerate(rows):
        num_labels = max(0, len(row) - 1)
        tokens_BT[number, :num_labels] = row[:num_labels]
        labels_BT[number, :num_labels] = row[1:]
    return tokens_BT, labels_BT
