"""A batch, and where its documents begin as attention kernels for sequences of any length want it."""

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.data.batch import Batch, cumulative_lengths
from megascale.data.objectives import Causal
from megascale.data.row import Row
from megascale.model.attention_mask import dense_mask


def assemble(many_lengths, seq_len):
    rows = [Row(np.ones(sum(ls), np.uint16), np.cumsum(ls).tolist(), sum(ls)) if ls else None for ls in many_lengths]
    arrays = Causal(seq_len, 0, label_document_starts=True).assemble(rows, np.zeros(len(rows), np.uint64))
    return Batch(*map(torch.from_numpy, arrays[:3]), torch.arange(len(rows)))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(1, 8), max_size=5), min_size=1, max_size=4), st.integers(0, 3))
def test_lengths_say_what_the_dense_mask_says(many_lengths, spare):
    """Causal attention within each stretch is the mask by documents.

    Caught mutations: a row's first document joined to the last of the row before, which has the same number; the end
    left out; documents compared with the position after.
    """
    seq_len = max(1, *(sum(lengths) for lengths in many_lengths), 1) + spare
    batch = assemble(many_lengths, seq_len)
    cu_seqlens, max_seqlen = cumulative_lengths(batch.documents_BT)
    bounds = cu_seqlens.tolist()
    assert cu_seqlens.dtype == torch.int32
    assert bounds[0] == 0
    assert bounds[-1] == batch.tokens_BT.numel()
    assert max_seqlen == max(stop - start for start, stop in pairwise(bounds))
    found_NN = torch.zeros(bounds[-1], bounds[-1], dtype=torch.bool)
    for start, stop in pairwise(bounds):
        found_NN[start:stop, start:stop] = torch.ones(stop - start, stop - start).tril().bool()
    dense_B1TT = dense_mask(batch.documents_BT, None, seq_len, torch.device("cpu"))
    assert torch.equal(found_NN, torch.block_diag(*dense_B1TT[:, 0].int()).bool())


def test_a_batch_moves_as_a_whole():
    batch = assemble([[3, 2]], 6)
    moved = batch.to(torch.device("meta"))
    given = {name for name, value in vars(batch).items() if value is not None}
    assert {name: tensor.device.type for name, tensor in vars(moved).items() if tensor is not None} == (
        dict.fromkeys(given, "meta"))
    assert moved.documents_BT.dtype == torch.int32
