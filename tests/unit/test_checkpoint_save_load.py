"""Saving with some ranks and loading with others: the same bits, in any layout."""

import os
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megascale.checkpoint.comm import LocalComm
from megascale.checkpoint.find import find_checkpoint, peek_checkpoint, verify_checkpoint
from megascale.checkpoint.folders import checkpoint_path, list_steps
from megascale.checkpoint.lease import LeaseClaim
from megascale.checkpoint.load import fill_pieces, load_pieces
from megascale.checkpoint.local_store import LocalStore
from megascale.checkpoint.retention import Retention
from megascale.checkpoint.save import save_checkpoint
from megascale.errors import CheckpointError, LeaseLostError, NonFiniteError
from tests.support.checkpoint_ranks import (
    RUN,
    cut_columns,
    cut_flat,
    equal_bits,
    make_tensors,
    run_ranks,
    save_all,
    state_at,
    zeros_like,
)

SHAPES = {"master/a": (7, 5), "master/b": (), "exp_avg/a": (7, 5), "exp_avg/b": (), "master/c": (2, 3, 4)}
shapes = st.dictionaries(
    st.sampled_from(list("pqrst")), st.lists(st.integers(1, 6), max_size=3).map(tuple), min_size=1, max_size=4
)
cuts = st.lists(st.integers(0, 1_000_000), max_size=5)


def load_all(checkpoint, ranks):
    return run_ranks(len(ranks), lambda comm: load_pieces(checkpoint, ranks[comm.rank], comm=comm))


def lay_out(tensors, layout):
    return cut_columns(tensors, layout) if isinstance(layout, int) else cut_flat(tensors, layout)


@settings(deadline=None, max_examples=60)
@given(shapes, cuts | st.integers(1, 5), cuts | st.integers(1, 5), st.integers(0, 2**32))
def test_any_layout_loads_what_any_other_saved(shapes, saved_as, loaded_as, seed):
    """Loads other partitions than were saved; reading slices relative to the tensor instead of the box fails it."""
    tensors = make_tensors(shapes, seed)
    with tempfile.TemporaryDirectory() as folder:
        save_all(Path(folder), 1, lay_out(tensors, saved_as))
        wanted = lay_out(tensors, loaded_as)
        loaded = zeros_like(wanted)
        assert load_all(verify_checkpoint(LocalStore(Path(folder)), 1), loaded) == [None] * len(loaded)
    assert equal_bits(loaded, wanted)


def test_the_checkpoint_carries_state_and_run(tmp_path):
    save_all(tmp_path, 6, cut_flat(make_tensors(SHAPES), [500_000]))
    found = find_checkpoint(LocalStore(tmp_path), run_id="run-a", comm=LocalComm())
    assert (found.index.state, found.index.run, found.rejected) == (state_at(6), RUN, ())


def test_what_is_written_is_plain_safetensors_and_checks_out_with_sha256sum(tmp_path):
    tensors = make_tensors(SHAPES)
    save_all(tmp_path, 1, cut_flat(tensors, []))
    folder = checkpoint_path(tmp_path, 1)
    entries = load_file(folder / "rank_00000.safetensors")
    assert torch.equal(entries["master/a[0:7, 0:5]"], tensors["master/a"])
    subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=folder, check=True, capture_output=True)
    assert sorted(os.listdir(folder)) == ["SHA256SUMS", "index.json", "rank_00000.safetensors"]


def test_only_owned_pieces_are_written_and_all_are_filled(tmp_path):
    tensors = make_tensors(SHAPES)
    mine, = cut_flat(tensors, [])
    copies = [type(piece)(piece.key, piece.global_shape, piece.box, piece.tensor, False) for piece in mine]
    save_all(tmp_path, 1, [mine, copies])
    assert verify_checkpoint(LocalStore(tmp_path), 1).index.files["rank_00001.safetensors"].bytes < 20
    (owned,), (copied,) = zeros_like([mine]), zeros_like([copies])
    assert load_all(peek_checkpoint(LocalStore(tmp_path)), [owned, copied]) == [None, None]
    assert equal_bits([owned, copied], [mine, copies])


def test_a_tool_reads_the_pieces_that_it_wants(tmp_path):
    tensors = make_tensors(SHAPES)
    save_all(tmp_path, 1, cut_flat(tensors, [300_000, 600_000]))
    wanted = {key: tensor for key, tensor in tensors.items() if key.startswith("master/")}
    ranks = zeros_like(cut_columns(wanted, 2))
    for pieces in ranks:
        fill_pieces(peek_checkpoint(LocalStore(tmp_path)), pieces)
    assert equal_bits(ranks, cut_columns(wanted, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"master/new": (3,)}, "lacks master/new, which this model"),
        ({"master/a": (5, 7)}, r"master/a has shape \[7, 5\], in this model it is \[5, 7\]"),
        ({"master/c": None, "exp_avg/a": None}, "holds exp_avg/a, master/c, which this model and optimizer don't have"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_by_name_on_every_rank(tmp_path, change, message):
    save_all(tmp_path, 1, cut_flat(make_tensors(SHAPES), [300_000]))
    other = {key: shape for key, shape in {**SHAPES, **change}.items() if shape is not None}
    wanted = zeros_like(cut_flat(make_tensors(other), [300_000, 800_000]))
    outcomes = load_all(peek_checkpoint(LocalStore(tmp_path)), wanted)
    assert all(isinstance(outcome, CheckpointError) for outcome in outcomes)
    with pytest.raises(CheckpointError, match=message):
        raise next(outcome for outcome in outcomes if "failed" not in str(outcome))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_state_is_never_saved(tmp_path, value):
    """Every rank refuses together, the guilty one by name; without the check the NaN would be resumed."""
    ranks = cut_flat(make_tensors(SHAPES), [500_000])
    save_all(tmp_path, 1, ranks)
    ranks[1][0].tensor[0] = value
    outcomes = save_all(tmp_path, 2, ranks)
    assert [type(outcome) for outcome in outcomes] == [NonFiniteError] * 2
    assert ranks[1][0].key in str(outcomes[1])
    assert list_steps(tmp_path) == [1]
    assert os.listdir(tmp_path / "checkpoints") == ["step_00000001"]


def test_pieces_that_overlap_or_leave_a_gap_are_not_committed(tmp_path):
    ranks = cut_flat(make_tensors(SHAPES), [500_000])
    for wrong in ([ranks[0], ranks[0]], [ranks[0], ranks[1][1:]]):
        first = save_all(tmp_path, 2, wrong)[0]
        assert isinstance(first, CheckpointError)
        assert list_steps(tmp_path) == []
        assert os.listdir(tmp_path / "checkpoints") == []


def test_the_newest_are_kept_and_a_step_is_saved_once(tmp_path):
    ranks = cut_flat(make_tensors(SHAPES), [500_000])
    for step in (1, 2, 3, 4):
        save_all(tmp_path, step, ranks, keep_last=2)
        assert list_steps(tmp_path) == [1, 2, 3, 4][max(0, step - 2): step]
    before = (checkpoint_path(tmp_path, 4) / "index.json").stat().st_ino
    assert save_all(tmp_path, 4, ranks, keep_last=1) == [checkpoint_path(tmp_path, 4)] * 2
    assert (checkpoint_path(tmp_path, 4) / "index.json").stat().st_ino == before


@pytest.mark.parametrize("num_good_checks", [0, 1])
def test_a_lost_lease_stops_the_save(num_good_checks, tmp_path, monkeypatch):
    """Before anything of the new owner's is touched, and again right before the commit."""
    checks = [None] * num_good_checks + [LeaseLostError("another job holds the run folder")]

    def check_claim(claim):
        if (found := checks.pop(0)) is not None:
            raise found

    monkeypatch.setattr("megascale.checkpoint.persist.check_claim", check_claim)
    with pytest.raises(LeaseLostError, match="another job holds"):
        save_checkpoint(
            LocalStore(tmp_path), RUN, state_at(1), cut_flat(make_tensors(SHAPES), [])[0],
            comm=LocalComm(), retention=Retention(2), claim=LeaseClaim("lease.json", None),
        )
    assert not checks
    assert not list(tmp_path.glob("checkpoints/*"))


def test_a_full_disk_is_found_before_anything_is_written(tmp_path, monkeypatch):
    ranks = cut_flat(make_tensors(SHAPES), [500_000])
    monkeypatch.setattr("megascale.checkpoint.local_store.free_bytes", lambda folder: 2**20)
    outcomes = save_all(tmp_path, 1, ranks)
    assert all(isinstance(outcome, CheckpointError) for outcome in outcomes)
    assert "step_00000001: not saved: the disk is too full. It needs 2.0 MiB, 1.0 MiB are free" in str(outcomes[0])


def test_a_write_that_takes_only_a_part_goes_on_with_the_rest(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:5]))
    ranks = cut_flat(make_tensors(SHAPES), [500_000])
    save_all(tmp_path, 1, ranks)
    loaded = zeros_like(ranks)
    load_all(peek_checkpoint(LocalStore(tmp_path)), loaded)
    assert equal_bits(loaded, ranks)
