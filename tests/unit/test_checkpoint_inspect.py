"""What the tools say of checkpoints: lists, verification bit by bit, differences, pruning."""

import errno
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from launcher.checkpoint import app
from megascale.checkpoint.comm import LocalComm
from megascale.checkpoint.difference import compare_indices, compare_values, open_tensors
from megascale.checkpoint.digest import MODULUS, digest_box
from megascale.checkpoint.find import read_stored_index
from megascale.checkpoint.folders import checkpoint_path
from megascale.checkpoint.inspect import choose_step, list_checkpoints, open_place, split_step
from megascale.checkpoint.lease import RunLease
from megascale.checkpoint.local_store import LocalStore
from megascale.checkpoint.prune import plan_pruning, prune
from megascale.checkpoint.records import to_json
from megascale.checkpoint.retention import Retention
from megascale.checkpoint.save import save_checkpoint
from megascale.checkpoint.store import open_store
from megascale.checkpoint.verify import PlainFile, digest_stretch, verify_bits
from megascale.errors import CheckpointError
from megascale.parallel.boxes import Box
from tests.support.checkpoint_ranks import RUN, cut_columns, cut_flat, make_tensors, save_all, state_at
from tests.support.s3_server import serve_s3

SHAPES = {"master/a": (7, 5), "exp_avg/a": (7, 5), "exp_avg/s": ()}
CONFIG = {"checkpoint": {"keep_last": 2, "keep_every_steps": 6, "keep_best": 0}}
DEFAULT = {"last": None, "every_steps": None, "best": None}


def save(folder, step, ranks=None, run_id="run-a"):
    ranks = ranks or cut_flat(make_tensors(SHAPES, seed=step), [300_000, 600_000])
    save_all(folder, step, ranks, run=replace(RUN, config=CONFIG, run_id=run_id), keep_last=9)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run folder with steps 3, 6, 9, 12. Not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    (folder / "run.json").write_bytes(to_json({"run_id": "run-a", "eos_id": 0, "url": None}))
    for step in (3, 6, 9, 12):
        save(folder, step)
    return folder


@pytest.fixture
def run_folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_a_list_says_what_is_kept_and_what_is_wrong(run_folder):
    """Mutation: summaries without the sizes of files call step 9 whole."""
    (checkpoint_path(run_folder, 9) / "rank_00001.safetensors").write_bytes(b"cut")
    flip(checkpoint_path(run_folder, 3) / "index.json", 40)
    LocalStore(run_folder).quarantine(12, "a bit was flipped [here]")
    (run_folder / "checkpoints" / "step_00000015.tmp-12").mkdir()
    (run_folder / "checkpoints" / "step_00000002.trash").mkdir()
    listing = list_checkpoints(open_place(str(run_folder)))
    three, six, nine = listing.checkpoints
    assert (listing.run_id, listing.policy) == ("run-a", Retention(2, 6, 0))
    assert "index.json" in three.problem
    assert (six.step, six.kept, six.problem, six.num_files, six.tokens) == (6, ("last", "every"), None, 3, 600)
    assert six.bytes == sum(p.stat().st_size for p in checkpoint_path(run_folder, 6).glob("*.safetensors"))
    assert nine.problem.startswith("rank_00001.safetensors: 3 bytes, the index lists ")
    assert [(left.what, left.name, left.reason) for left in listing.remnants] == [
        ("being deleted", "step_00000002.trash", None), ("being written", "step_00000015.tmp-12", None),
        ("quarantined", "step_00000012", "a bit was flipped [here]"),
    ]


def test_every_layout_verifies(tmp_path):
    """Mutation: a digest of the part's place within its slice, not within the tensor, fails all but one rank."""
    tensors = make_tensors({"master/a": (6, 4, 5), "master/b": (9,), "exp_avg/s": ()})
    for step, ranks in enumerate((cut_flat(tensors, [123_456, 700_000]), cut_columns(tensors, 3)), 1):
        save(tmp_path, step, ranks)
        result = verify_bits(LocalStore(tmp_path), step)
        assert result.is_whole, result
        assert (result.num_files, result.num_tensors) == (3, 3)
        assert result.bytes == sum(p.stat().st_size for p in checkpoint_path(tmp_path, step).glob("*.safetensors"))


def test_small_blocks_give_the_same_verdict(saved, monkeypatch):
    """Mutation: a block's offset that is counted from the file's start fails."""
    monkeypatch.setattr("megascale.checkpoint.verify.BLOCK_BYTES", 12)
    assert verify_bits(open_place(str(saved)), 12).is_whole


def test_any_flipped_bit_is_found_and_its_file_and_tensor_named(run_folder):
    """Mutation: `_check_content` without the digest names no tensor, without SHA-256 misses bytes of the header."""
    path = checkpoint_path(run_folder, 12) / "rank_00001.safetensors"
    whole, store = path.read_bytes(), open_place(str(run_folder))
    header_bytes = 8 + int.from_bytes(whole[:8], "little")
    for position in {*range(0, len(whole), 7), len(whole) - 1}:
        flip(path, position)
        result = verify_bits(store, 12)
        assert not result.is_whole
        assert [message.split(":")[0] for message in result.bad_files] == ["rank_00001.safetensors"]
        if position >= header_bytes:
            assert len(result.bad_tensors) == 1
        path.write_bytes(whole)
    assert verify_bits(store, 12).is_whole


def test_a_swapped_file_a_missing_one_and_a_bad_index_are_named(run_folder):
    """Mutation: comparing tensors only with files that are there finds nothing wrong with a missing one's tensors."""
    store, folder = open_place(str(run_folder)), checkpoint_path(run_folder, 12)
    shutil.copy(checkpoint_path(run_folder, 9) / "rank_00000.safetensors", folder)
    (folder / "rank_00002.safetensors").unlink()
    result = verify_bits(store, 12)
    assert "SHA-256" in result.bad_files[0]
    assert result.bad_files[1] == "rank_00002.safetensors: no such file"
    assert set(result.bad_tensors) == set(SHAPES)
    flip(folder / "SHA256SUMS", 3)
    assert "SHA256SUMS" in verify_bits(store, 12).problem


def test_a_disk_that_fails_damages_one_file(run_folder, monkeypatch):
    """Mutation: mapping files instead of reading them: a real disk then ends the process by SIGBUS."""

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(PlainFile, "read", fail)
    result = verify_bits(open_place(str(run_folder)), 12)
    assert result.bad_files[0] == "rank_00000.safetensors: can't be read: Input/output error"


def test_a_network_that_is_away_damages_nothing(run_folder, monkeypatch):
    """Mutation: every OSError as damage."""

    def fail(*_):
        raise OSError("connection lost")

    monkeypatch.setattr(PlainFile, "read", fail)
    with pytest.raises(OSError, match="connection lost"):
        verify_bits(open_place(str(run_folder)), 12)


@given(st.data())
def test_digests_of_stretches_add_up(data):
    """Mutation: leaving out the box's own starts."""
    shape = tuple(data.draw(st.lists(st.integers(1, 5), max_size=3)))
    starts = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    stops = tuple(data.draw(st.integers(start + 1, size)) for start, size in zip(starts, shape, strict=True))
    box = Box(starts, stops)
    values = np.arange(1, box.numel + 1, dtype=np.uint32)
    cut = data.draw(st.integers(0, box.numel))
    total = digest_stretch(values[:cut], 0, shape, box) + digest_stretch(values[cut:], cut, shape, box)
    assert total % MODULUS == digest_box(values, shape, box)


def test_a_copied_folder_of_any_name_verifies(saved, tmp_path):
    copy = shutil.copytree(checkpoint_path(saved, 9), tmp_path / "kept for the paper")
    store = open_place(str(copy))
    assert store.steps() == [9]
    assert verify_bits(store, 9).is_whole
    flip(copy / "index.json", 10)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        store.steps()


def test_places_and_steps_are_told_apart(saved, tmp_path):
    assert split_step("runs/a@12") == ("runs/a", 12)
    assert split_step("s3://u@host/b") == ("s3://u@host/b", None)
    assert split_step("runs/a@b") == ("runs/a@b", None)
    assert choose_step(open_place(str(saved)), None) == 12
    with pytest.raises(CheckpointError, match="no checkpoint of step 5; those of steps 3, 6, 9, 12 are there"):
        choose_step(open_place(str(saved)), 5)
    with pytest.raises(CheckpointError, match="holds no checkpoints: neither a run folder"):
        open_place(str(tmp_path))


def test_equal_tensors_in_other_layouts_are_equal(tmp_path):
    """Mutation: comparing slices or files instead of digests."""
    tensors = make_tensors(SHAPES)
    save(tmp_path, 1, cut_flat(tensors, [500_000]))
    save(tmp_path, 2, cut_columns(tensors, 3))
    difference = compare_indices(*(read_stored_index(LocalStore(tmp_path), step) for step in (1, 2)))
    assert difference.has_equal_tensors
    assert difference.num_equal == 3
    assert {change.key for change in difference.state} >= {"step", "tokens"}


@pytest.mark.parametrize("block", [3, 1 << 21])
def test_values_are_compared_across_layouts(tmp_path, monkeypatch, block):
    """Mutation: `largest` of the last block only; a reader that fills from the first slice alone."""
    monkeypatch.setattr("megascale.checkpoint.difference.BLOCK_ELEMENTS", block)
    tensors = make_tensors({"master/a": (7, 5), "master/b": (4,), "master/c": (2,)})
    other = {key: tensor.clone() for key, tensor in tensors.items()}
    other["master/a"][0, 4] += 0.5
    other["master/a"][5, 2] -= 0.25
    other["master/c"] = other["master/c"].reshape(1, 2)
    save(tmp_path, 1, cut_flat(tensors, [500_000]))
    save(tmp_path, 2, cut_columns(other | {"master/d": torch.ones(2)}, 3))
    store = LocalStore(tmp_path)
    indices = [read_stored_index(store, step) for step in (1, 2)]
    difference = compare_indices(*indices)
    assert (difference.different, difference.only, difference.num_equal) == (("master/a",), ((), ("master/d",)), 1)
    assert [(change.key, change.old, change.new) for change in difference.reshaped] == [("master/c", [2], [1, 2])]
    with open_tensors(store, indices[0]) as one, open_tensors(store, indices[1]) as two:
        apart = compare_values(one, two, "master/a", (7, 5))
        same = compare_values(one, two, "master/b", (4,))
    delta = other["master/a"].double() - tensors["master/a"].double()
    assert (apart.numel, apart.num_different, apart.largest) == (35, 2, delta.abs().max().item())
    assert apart.relative == pytest.approx((delta.norm() / tensors["master/a"].double().norm()).item(), rel=1e-12)
    assert (same.num_different, same.largest, same.relative) == (0, 0.0, 0.0)


class VanishingStore(LocalStore):
    """A run that is at work: step 9 is deleted as soon as somebody looks at it."""

    def read_small(self, step, name, limit_bytes):
        content = super().read_small(step, name, limit_bytes)
        if step == 9:
            shutil.rmtree(self.path(9), ignore_errors=True)
        return content


def test_what_a_run_deletes_meanwhile_is_not_called_damaged(run_folder, monkeypatch):
    """Mutation: without a second look at the steps, step 9 is listed and verified as damaged."""
    before = shutil.copytree(run_folder, run_folder.with_name("before"))
    listing = list_checkpoints(VanishingStore(run_folder))
    assert [(one.step, one.problem) for one in listing.checkpoints] == [(3, None), (6, None), (12, None)]
    monkeypatch.setattr("megascale.checkpoint.inspect.open_place", VanishingStore)
    done = CliRunner().invoke(app, ["verify", str(before), "--all"])
    assert done.exit_code == 0, done.output
    assert done.output.count("ok: ") == 3
    assert "step_00000009: was deleted while it was read" in done.output


def test_pruning_applies_the_rule_of_the_run_or_the_one_given(run_folder):
    """Mutation: options that replace the whole rule of the run lose step 6."""
    trash = run_folder / "checkpoints" / "step_00000001.tmp-1"
    trash.mkdir()
    plan = plan_pruning(run_folder, **DEFAULT | {"last": 1})
    assert plan.kept == {6: ("every",), 12: ("last", "every")}
    assert open_place(str(run_folder)).steps() == [3, 6, 9, 12]
    assert trash.exists()
    assert prune(run_folder, **DEFAULT | {"last": 1}) == plan
    assert open_place(str(run_folder)).steps() == [6, 12]
    assert not trash.exists()
    assert [one.step for one in plan.deleted] == [3, 9]
    assert plan.freed_bytes == sum(one.bytes for one in plan.deleted)


def test_nothing_is_pruned_when_the_newest_is_damaged(run_folder):
    """Mutation: verifying after the deletions, or only the sizes."""
    flip(checkpoint_path(run_folder, 12) / "rank_00000.safetensors", -1)
    with pytest.raises(CheckpointError, match="nothing was deleted, because the newest"):
        prune(run_folder, last=1, every_steps=0, best=0)
    (checkpoint_path(run_folder, 12) / "index.json").unlink()
    with pytest.raises(CheckpointError, match="nothing was deleted, because the newest"):
        prune(run_folder, last=1, every_steps=0, best=0)
    assert open_place(str(run_folder)).steps() == [3, 6, 9, 12]


def test_damaged_ones_and_those_of_other_runs_neither_count_nor_go(run_folder):
    """Mutation: counting every folder as one of the last keeps the damaged 9 in place of 6."""
    (checkpoint_path(run_folder, 9) / "SHA256SUMS").unlink()
    save(run_folder, 4, run_id="run-b")
    plan = prune(run_folder, last=2, every_steps=0, best=0)
    assert [one.step for one in plan.passed_over] == [4, 9]
    assert open_place(str(run_folder)).steps() == [4, 6, 9, 12]


def test_a_run_at_work_is_not_pruned(run_folder):
    """Mutation: pruning without the lease."""
    with RunLease.take(run_folder), pytest.raises(CheckpointError, match=f"is in use by process {os.getpid()}"):
        prune(run_folder, **DEFAULT | {"last": 1})
    assert open_place(str(run_folder)).steps() == [3, 6, 9, 12]
    with pytest.raises(CheckpointError, match="give the run folder instead"):
        prune("s3://bucket/runs/a", **DEFAULT)


def test_an_object_store_is_read_and_pruned_by_the_same_tools(tmp_path):
    """Mutation: opening every store's files as local ones."""
    (tmp_path / "bucket").mkdir()
    pieces, = cut_flat(make_tensors(SHAPES), [])
    run = replace(RUN, config=CONFIG)
    with serve_s3(tmp_path / "bucket", "models") as url:
        (tmp_path / "run.json").write_bytes(to_json({"run_id": "run-a", "eos_id": 0, "url": url}))
        place = f"{url}/run-a"
        for step in (3, 6, 9):
            save_checkpoint(open_store(place), run, state_at(step), pieces, comm=LocalComm(), retention=Retention(9))
        listing = list_checkpoints(open_place(str(tmp_path)))
        assert listing == list_checkpoints(open_place(place))
        assert [(one.step, one.kept, one.problem) for one in listing.checkpoints] == [
            (3, (), None), (6, ("last", "every"), None), (9, ("last",), None),
        ]
        store = open_place(place)
        assert verify_bits(store, 6).is_whole
        indices = [read_stored_index(store, step) for step in (3, 9)]
        with open_tensors(store, indices[0]) as one, open_tensors(store, indices[1]) as two:
            assert compare_values(one, two, "master/a", (7, 5)).num_different == 0
        prune(tmp_path, **DEFAULT | {"last": 1})
        assert store.steps() == [6, 9]


@pytest.mark.parametrize("command", [["list", "a"], ["verify", "a"], ["diff", "a", "b"]])
def test_what_the_system_refuses_is_a_clear_error(monkeypatch, command):
    """Mutation: a command without `clear_errors` ends with a traceback."""

    def refuse(place):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), place)

    monkeypatch.setattr("megascale.checkpoint.inspect.open_place", refuse)
    error = CliRunner().invoke(app, command).exception
    assert isinstance(error, CheckpointError)
    assert "Permission denied: 'a'" in str(error)
