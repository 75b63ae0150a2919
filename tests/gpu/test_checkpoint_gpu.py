"""Saving from a GPU beside training: the copy is complete before the step may go on, in pinned memory."""

import pytest
import torch

from megascale.checkpoint.comm import LocalComm
from megascale.checkpoint.find import find_checkpoint
from megascale.checkpoint.load import load_pieces
from megascale.checkpoint.local_store import LocalStore
from megascale.checkpoint.retention import Retention
from megascale.checkpoint.save import Saver, build_writer
from megascale.engine.base import StatePiece
from megascale.parallel.boxes import whole_box
from tests.support.checkpoint_ranks import RUN, state_at

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SHAPE = (4096, 4096)


def piece_of(tensor: torch.Tensor) -> StatePiece:
    return StatePiece("master/a", SHAPE, whole_box(SHAPE), tensor.view(-1), is_owner=True)


def test_a_tensor_that_changes_at_once_is_saved_as_it_was(tmp_path):
    """Mutation that must fail it: returning from the copy without waiting for the stream."""
    device = torch.device("cuda")
    tensor = torch.randn(SHAPE, device=device)
    expected = tensor.clone()
    saver = Saver(
        LocalStore(tmp_path), RUN, comm=LocalComm(), retention=Retention(2), writer=build_writer(True, device)
    )
    try:
        for step in (1, 2):
            expected.copy_(tensor)
            saver.start(state_at(step), [piece_of(tensor)])
            tensor.normal_()
            assert saver.finish() == step
            loaded = torch.zeros(SHAPE, device=device)
            found = find_checkpoint(LocalStore(tmp_path), run_id=RUN.run_id, comm=LocalComm())
            load_pieces(found, [piece_of(loaded)], comm=LocalComm())
            assert torch.equal(loaded, expected)
    finally:
        saver.close()
