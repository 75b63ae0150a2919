"""Damage to a run's checkpoints drawn at random: noticed before a number is used, the file named, the one before taken.

Two ranks look for the checkpoint, as a run does, and load it: the numbers are those of the step that they agree on.
Mutations seen to be caught: a file's size is compared and not its hash; the list of hashes isn't compared with the
index; the step in the index, or the run id, isn't looked at; and those named at single tests.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megascale.checkpoint.comm import LocalComm
from megascale.checkpoint.find import VerifiedCheckpoint, find_checkpoint, verify_checkpoint
from megascale.checkpoint.folders import checkpoint_path
from megascale.checkpoint.index import CheckpointIndex, hash_list
from megascale.checkpoint.load import load_pieces
from megascale.checkpoint.local_store import LocalStore
from megascale.checkpoint.records import parse_record
from megascale.errors import CheckpointError
from tests.support.checkpoint_ranks import (
    RUN,
    cut_columns,
    cut_flat,
    equal_bits,
    make_tensors,
    run_ranks,
    save_all,
    zeros_like,
)

TENSORS = {
    step: make_tensors({"master/a": (8, 5), "exp_avg/a": (8, 5), "master/b": (3,)}, seed=step) for step in (3, 6, 9)
}
RANK_FILES = ["rank_00000.safetensors", "rank_00001.safetensors"]
FILES = [*RANK_FILES, "index.json", "SHA256SUMS"]
Damage = Callable[[Path, random.Random], str]
"""Damages the newest checkpoint, of step 6, of a run folder with steps 3 and 6; gives what the reason must name."""


def damage_file(change: Callable[[bytes, random.Random], bytes], names: list[str] = FILES) -> Damage:
    """Damage to the content of one file."""

    def damage(run_folder: Path, generator: random.Random) -> str:
        path = checkpoint_path(run_folder, 6) / generator.choice(names)
        path.write_bytes(change(path.read_bytes(), generator))
        return path.name

    return damage


def replace_file(put: Callable[[Path, bytes], object]) -> Damage:
    """Damage that puts something else in the place of one file."""

    def damage(run_folder: Path, generator: random.Random) -> str:
        path = checkpoint_path(run_folder, 6) / generator.choice(FILES)
        content = path.read_bytes()
        path.unlink()
        put(path, content)
        return path.name

    return damage


def flip(content: bytes, generator: random.Random) -> bytes:
    bit = generator.randrange(8 * len(content))
    return content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]


def flip_in_header(content: bytes, generator: random.Random) -> bytes:
    header = 8 + int.from_bytes(content[:8], "little")
    return flip(content[:header], generator) + content[header:]


def overwrite(content: bytes, generator: random.Random) -> bytes:
    """A block that was never written: zeros, where there were none."""
    start = generator.randrange(len(content) - 16)
    stop = generator.randrange(start + 16, len(content) + 1)
    return content[:start] + bytes(stop - start) + content[stop:]


def swap_step(run_folder: Path, generator: random.Random) -> str:
    name = generator.choice(FILES)
    shutil.copy(checkpoint_path(run_folder, 3) / name, checkpoint_path(run_folder, 6) / name)
    return name


def swap_ranks(run_folder: Path, generator: random.Random) -> str:
    first, second = (checkpoint_path(run_folder, 6) / name for name in RANK_FILES)
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    return RANK_FILES[0]


def swap_index(run_folder: Path, generator: random.Random) -> str:
    for name in FILES[2:]:
        shutil.copy(checkpoint_path(run_folder, 3) / name, checkpoint_path(run_folder, 6) / name)
    return "is the checkpoint of step 3"


def swap_folder(run_folder: Path, generator: random.Random) -> str:
    shutil.rmtree(checkpoint_path(run_folder, 6))
    shutil.copytree(checkpoint_path(run_folder, 3), checkpoint_path(run_folder, 6))
    return "is the checkpoint of step 3"


def leave_part(run_folder: Path, generator: random.Random) -> str:
    """What an upload that was cut short leaves: some of the files, perhaps none."""
    gone = generator.sample(FILES, generator.randint(1, len(FILES)))
    for name in gone:
        (checkpoint_path(run_folder, 6) / name).unlink()
    return next(name for name in ("index.json", "SHA256SUMS", *RANK_FILES) if name in gone)


def put_strangers(run_folder: Path, generator: random.Random) -> str:
    """The same step of another run."""
    shutil.rmtree(checkpoint_path(run_folder, 6))
    save_all(run_folder, 6, cut_flat(TENSORS[6], [400_000]), run=replace(RUN, run_id="run-b"))
    return "belongs to run run-b"


def put_empty_folder(path: Path, content: bytes) -> None:
    path.mkdir()


def put_link(path: Path, content: bytes) -> None:
    """A link to the very content: it may change behind the run's back."""
    target = path.parent.parent.parent / "elsewhere"
    target.write_bytes(content)
    path.symlink_to(target)


KINDS: dict[str, Damage] = {
    "flipped bit": damage_file(flip),
    "flipped bit of a header": damage_file(flip_in_header, RANK_FILES),
    "zeros": damage_file(overwrite),
    "cut": damage_file(lambda content, generator: content[: generator.randrange(1, len(content))]),
    "emptied": damage_file(lambda content, generator: b""),
    "grown": damage_file(lambda content, generator: content + generator.randbytes(generator.randint(1, 9000))),
    "missing": replace_file(lambda path, content: None),
    "folder": replace_file(put_empty_folder),
    "fifo": replace_file(lambda path, content: os.mkfifo(path)),
    "link": replace_file(put_link),
    "file of another step": swap_step,
    "files of two ranks": swap_ranks,
    "index of another step": swap_index,
    "folder of another step": swap_folder,
    "incomplete": leave_part,
    "another run's": put_strangers,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run folder with the checkpoints of steps 3 and 6, of two ranks each."""
    folder = tmp_path_factory.mktemp("whole")
    for step in (3, 6):
        save_all(folder, step, cut_flat(TENSORS[step], [400_000]))
    return folder


def find(run_folder: Path) -> VerifiedCheckpoint:
    """What two ranks find and agree on; raises what both of them raise."""
    first, second = run_ranks(2, lambda comm: find_checkpoint(LocalStore(run_folder), run_id="run-a", comm=comm))
    if isinstance(first, Exception):
        assert str(first) == str(second)
        raise first
    assert (first.step, first.rejected) == (second.step, second.rejected)
    return first


def check_numbers(found: VerifiedCheckpoint, step: int) -> None:
    """What is loaded, by two ranks in another layout than it was saved in, is the state of the step."""
    wanted = cut_columns(TENSORS[step], 2)
    loaded = zeros_like(wanted)
    assert run_ranks(2, lambda comm: load_pieces(found, loaded[comm.rank], comm=comm)) == [None, None]
    assert equal_bits(loaded, wanted)


def check_case(folder: Path, whole: Path, kind: str, case: int) -> None:
    run_folder = shutil.copytree(whole, folder / f"run_{case}")
    named = KINDS[kind](run_folder, random.Random(f"{kind} {case}"))
    found = find(run_folder)
    assert (found.step, len(found.rejected)) == (3, 1), (kind, case)
    assert "step_00000006" in found.rejected[0]
    assert named in found.rejected[0], (kind, case, found.rejected)
    check_numbers(found, 3)
    shutil.rmtree(run_folder)


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_noticed(whole, tmp_path, kind):
    """7 draws a kind."""
    for case in range(7):
        check_case(tmp_path, whole, kind, case)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_always_noticed(whole, tmp_path, kind):
    """100 more draws a kind."""
    for case in range(100, 200):
        check_case(tmp_path, whole, kind, case)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_whose_checkpoints_are_all_damaged_never_begins_anew(whole, tmp_path, kind):
    """Neither at once nor when it is started again. Mutation: `has_quarantine` always false."""
    run_folder = shutil.copytree(whole, tmp_path / "run")
    KINDS[kind](run_folder, random.Random(kind))
    (checkpoint_path(run_folder, 3) / "index.json").unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="--fresh"):
            find(run_folder)


def test_newer_names_that_are_no_checkpoint_of_this_run_are_passed_over(whole, tmp_path):
    """Drafts, pointers and strangers' higher steps; the run's own newest whole one is taken."""
    run_folder = shutil.copytree(whole, tmp_path / "run")
    checkpoints = run_folder / "checkpoints"
    (checkpoints / "latest").write_text("step_00000099")
    (run_folder / "latest").symlink_to("checkpoints/step_00000099")
    shutil.copytree(checkpoint_path(run_folder, 6), checkpoints / "step_00000012.tmp-0a1b")
    shutil.copytree(checkpoint_path(run_folder, 6), checkpoints / "step_12")
    save_all(run_folder, 9, cut_flat(TENSORS[9], [400_000]), run=replace(RUN, run_id="run-b"), keep_last=9)
    (checkpoints / "step_00000015").symlink_to(checkpoint_path(run_folder, 6))
    found = find(run_folder)
    assert found.step == 6
    assert ["step_00000015" in found.rejected[0], "belongs to run run-b" in found.rejected[1]] == [True, True]
    check_numbers(found, 6)
    assert not (checkpoints / "step_00000012.tmp-0a1b").exists()


def rewrite(folder: Path, change: Callable[[dict], object]) -> None:
    """An index changed by a tool that also brings the hashes up to date."""
    index = json.loads((folder / "index.json").read_bytes())
    change(index)
    text = json.dumps(index).encode()
    (folder / "index.json").write_bytes(text)
    (folder / "SHA256SUMS").write_bytes(hash_list(parse_record(CheckpointIndex, text, folder), text))


def change_digest(index: dict) -> None:
    index["tensors"]["master/b"]["digest"] = "0" * 16


def swap_tensors(index: dict) -> None:
    """The numbers of a tensor under another's name."""
    a, b = (index["tensors"][key]["slices"] for key in ("master/a", "exp_avg/a"))
    a[:], b[:] = b[:], a[:]


def swap_slices(index: dict) -> None:
    """Two parts of a tensor that are equally large, in each other's place."""
    first, second = index["tensors"]["exp_avg/a"]["slices"][:2]
    for side in ("starts", "stops"):
        first[side], second[side] = second[side], first[side]


@pytest.mark.parametrize(
    ("change", "named"),
    [(change_digest, ["master/b"]), (swap_tensors, ["exp_avg/a", "master/a"]), (swap_slices, ["exp_avg/a"])],
)
def test_numbers_that_are_not_those_saved_are_noticed_though_all_hashes_agree(whole, tmp_path, change, named):
    """Mutation: `load_pieces` doesn't compare digests."""
    run_folder = tmp_path / "run"
    save_all(run_folder, 6, cut_columns(TENSORS[6], 5))
    rewrite(checkpoint_path(run_folder, 6), change)
    checkpoint = verify_checkpoint(LocalStore(run_folder), 6, comm=LocalComm())
    loaded = zeros_like(cut_flat(TENSORS[6], [300_000]))
    results = run_ranks(2, lambda comm: load_pieces(checkpoint, loaded[comm.rank], comm=comm))
    for result in results:
        assert isinstance(result, CheckpointError)
        assert f"{', '.join(named)} in memory after loading isn't what was saved" in str(result)
