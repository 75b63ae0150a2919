"""Damaged and hostile checkpoints: all of it is noticed before a number is used, and the one before is taken."""

import hashlib
import json
import os
import random
import resource
import shutil

import pytest
import torch
from safetensors.torch import save

from megascale.checkpoint.comm import LocalComm
from megascale.checkpoint.find import find_checkpoint, verify_checkpoint
from megascale.checkpoint.folders import checkpoint_path
from megascale.checkpoint.index import CheckpointIndex, hash_list
from megascale.checkpoint.load import load_pieces
from megascale.checkpoint.local_store import LocalStore
from megascale.checkpoint.records import parse_record
from megascale.errors import CheckpointError
from tests.support.checkpoint_ranks import cut_flat, make_tensors, save_all, zeros_like
from tests.support.file_faults import run_forked

SHAPES = {"master/a": (7, 5), "exp_avg/a": (7, 5), "master/b": (3,)}
RANKS_OF = {step: cut_flat(make_tensors(SHAPES, seed=step), [400_000]) for step in (3, 6, 9)}
RANKS = RANKS_OF[6]
FILES = ["rank_00000.safetensors", "rank_00001.safetensors", "index.json", "SHA256SUMS"]
GROWTH_LIMIT_KIB = 400 << 10
"""Over what the test process has; the widest text below is 11 MiB, and parsed JSON takes up to 25 times its text."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run folder with the checkpoints of steps 3 and 6."""
    folder = tmp_path_factory.mktemp("whole")
    for step in (3, 6):
        save_all(folder, step, RANKS_OF[step])
    return folder


@pytest.fixture
def run_folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def find(run_folder):
    return find_checkpoint(LocalStore(run_folder), run_id="run-a", comm=LocalComm())


def check_falls_back(run_folder, name):
    found = find(run_folder)
    assert found.index.state.step == 3
    assert "step_00000006/" in found.rejected[0]
    assert name in found.rejected[0]


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_noticed(whole, tmp_path, name):
    """50 random bits of each kind of file. Mutation: skipping the hash of the index lets a changed `rows` through."""
    generator = random.Random(name)
    content = (checkpoint_path(whole, 6) / name).read_bytes()
    for case in range(50):
        folder = shutil.copytree(whole, tmp_path / str(case))
        bit = generator.randrange(len(content) * 8)
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (checkpoint_path(folder, 6) / name).write_bytes(damaged)
        check_falls_back(folder, name)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", ["missing", "empty", "cut", "longer", "swapped", "folder", "fifo", "link"])
def test_a_file_that_is_not_the_one_written_is_noticed(run_folder, name, fault):
    """A pipe must not make the reader wait, a link must not be followed."""
    other, path = (checkpoint_path(run_folder, step) / name for step in (3, 6))
    content = path.read_bytes()
    replacement = {"empty": b"", "cut": content[:-1], "longer": content + b"\0", "swapped": other.read_bytes()}
    path.unlink()
    if fault in replacement:
        path.write_bytes(replacement[fault])
    elif fault == "folder":
        path.mkdir()
    elif fault == "fifo":
        os.mkfifo(path)
    elif fault == "link":
        path.symlink_to(other)
    check_falls_back(run_folder, name)


def test_an_index_whose_state_was_edited_is_noticed(run_folder):
    path = checkpoint_path(run_folder, 6) / "index.json"
    path.write_text(path.read_text().replace('"rows": 48', '"rows": 40'))
    check_falls_back(run_folder, "index.json")


def test_a_checkpoint_folder_that_is_a_file_or_empty_is_quarantined(run_folder):
    checkpoint_path(run_folder, 9).write_text("not a folder")
    checkpoint_path(run_folder, 12).mkdir()
    found = find(run_folder)
    assert found.index.state.step == 6
    assert len(found.rejected) == 2


def rewrite(folder, index=None, files=None):
    """A forger's checkpoint: anything in it, with all hashes right."""
    for name, content in (files or {}).items():
        (folder / name).write_bytes(content)
    text = index if isinstance(index, bytes) else json.dumps(index).encode()
    (folder / "index.json").write_bytes(text)
    (folder / "SHA256SUMS").write_bytes(hash_list(parse_record(CheckpointIndex, text, folder), text))


HOSTILE_INDEXES = {
    "deep": b'{"format": ' + b"[" * 1_000_000,
    "deep config": b'{"run": {"config": ' + b'{"a":' * 1_000_000 + b"1" + b"}" * 1_000_000 + b"}}",
    "wide": b"{" + b",".join(b'"%d": 0' % i for i in range(1_000_000)) + b"}",
    "wide tensors": b'{"tensors": {' + b",".join(b'"%d": {}' % i for i in range(1_000_000)) + b"}}",
    "no object": b"[1, 2, 3]",
    "not JSON": b"\x80\x04\x95cos\nsystem\n",
    "bad UTF-8": b'{"format": "\xff\xfe"}',
    "number": b'{"format_version": 1' + b"0" * 1_000_000 + b"}",
    "empty": b"",
}


@pytest.mark.parametrize("name", HOSTILE_INDEXES)
def test_a_hostile_index_is_refused_within_bounded_memory(run_folder, name):
    (checkpoint_path(run_folder, 6) / "index.json").write_bytes(HOSTILE_INDEXES[name])
    check_refused_cheaply(lambda: verify_checkpoint(LocalStore(run_folder), 6))


def test_a_huge_index_is_not_even_read(run_folder):
    os.truncate(checkpoint_path(run_folder, 6) / "index.json", 1 << 40)
    check_refused_cheaply(lambda: verify_checkpoint(LocalStore(run_folder), 6))


def header(length: int, text: bytes) -> bytes:
    return length.to_bytes(8, "little") + text + b"\0" * 4000


HOSTILE_FILES = {
    "header of 2^63 bytes": header(1 << 63, b"{}"),
    "header of 90 MB": header(90_000_000, b"{}"),
    "header that is no JSON": header(8, b"\x80\x04cos\nsy"),
    "deep header": header(500_000, b"[" * 500_000),
    "pickle": b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94" + b"\0" * 4000,
    "no entries": header(2, b"{}"),
    "other entries": save({"master/a": torch.zeros(1000)}),
    "offsets past the end": header(66, b'{"x":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4000000000]}}'),
}


@pytest.mark.parametrize("name", HOSTILE_FILES)
def test_a_hostile_tensor_file_is_refused_within_bounded_memory(run_folder, name):
    """Size and hash are those of the index, so that it gets as far as the safetensors header."""
    check_forged_file(run_folder, HOSTILE_FILES[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32, torch.float64])
def test_entries_of_another_type_or_shape_are_refused(run_folder, dtype):
    index = verify_checkpoint(LocalStore(run_folder), 6).index
    parts = [part for record in index.tensors.values() for part in record.slices if part.file == FILES[0]]
    same = {part.entry: torch.zeros(part.box.shape) for part in parts}
    check_forged_file(run_folder, save({entry: tensor.to(dtype) for entry, tensor in same.items()}))
    check_forged_file(run_folder, save({entry: tensor.reshape(-1) for entry, tensor in same.items()}))


def check_forged_file(run_folder, content):
    folder = checkpoint_path(run_folder, 6)
    index = json.loads((folder / "index.json").read_text())
    (folder / FILES[0]).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    index["files"][FILES[0]] = {"bytes": len(content), "sha256": digest}
    rewrite(folder, index)
    checkpoint = verify_checkpoint(LocalStore(run_folder), 6)
    pieces = [piece for pieces in zeros_like(RANKS) for piece in pieces]
    check_refused_cheaply(lambda: load_pieces(checkpoint, pieces, comm=LocalComm()), FILES[0])


def check_refused_cheaply(action, *names):
    """Runs it in a child, so that the child's peak memory is the action's own."""
    def body():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(CheckpointError) as refused:
            action()
        assert all(name in str(refused.value) for name in names), str(refused.value)
        assert len(str(refused.value)) < 2000
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH_LIMIT_KIB

    assert run_forked(body) == 0
