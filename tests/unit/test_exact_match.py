"""Whole targets that a model writes, counted."""

import numpy as np
import torch

from megascale.config.model import ModelConfig
from megascale.data.loader import build_batch
from megascale.data.pairs import Pairs
from megascale.data.row import Row
from megascale.model.axes import ONE_RANK
from megascale.train.exact_match import count_exact


class Scripted:
    """Stands for a model that writes these tokens, whatever it reads."""

    config = ModelConfig(family="t5", num_layers=1, d_model=32, num_heads=4, vocab_size=61, max_seq_len=16)
    device, axes = torch.device("cpu"), ONE_RANK

    def __init__(self, scripts: list[list[int]]):
        self.scripts, self.calls = scripts, 0

    def __call__(self, tokens_BU, context, *, last_B):
        likeliest = [script[min(self.calls, len(script) - 1)] for script in self.scripts]
        self.calls += 1
        return torch.nn.functional.one_hot(torch.tensor(likeliest), 61)


def test_whole_targets_are_counted():
    """Of five pairs two are right, a short and a long one; a row that fills up the batch has no target.

    Seen to catch: rows without a target counted.
    """
    targets = [[7, 0], [7, 8, 9, 10, 0], [7, 8, 0], [7, 8, 0], [7, 8, 0]]
    written = [[7, 0], [7, 8, 9, 10, 0], [7, 9, 0], [7, 0], [7, 8, 9, 0]]
    rows = [Row(np.array([5, 0, *target], np.uint16), [2 + len(target)], 2 + len(target)) for target in targets]
    arrays = Pairs(seq_len=8, target_len=6, end_id=0).assemble([*rows, None], np.zeros(6, np.uint64))
    batch = build_batch(arrays, np.array([0, 1, 2, 3, 4, -1]), slice(None))
    assert count_exact(Scripted(written), batch, end=0) == (2, 5)
