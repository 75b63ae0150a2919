"""A checkpoint of another version of megascale: refused by name, and never moved away as if it were damaged."""

import hashlib
import json

import pytest

from megascale.checkpoint.comm import LocalComm
from megascale.checkpoint.find import find_checkpoint
from megascale.checkpoint.local_store import LocalStore
from megascale.errors import CheckpointError
from tests.support.checkpoint_ranks import cut_flat, make_tensors, save_all


def write_version(folder, version: int, *, with_hash: bool) -> None:
    """Rewrites the format version of an index; with its hash, as a megascale of that version would have."""
    path = folder / "checkpoints/step_00000002"
    text = (path / "index.json").read_bytes()
    new = json.dumps(json.loads(text) | {"format_version": version, "of_the_future": 1}).encode()
    (path / "index.json").write_bytes(new)
    if with_hash:
        hashes = [hashlib.sha256(content).hexdigest() for content in (text, new)]
        sums = (path / "SHA256SUMS").read_text()
        (path / "SHA256SUMS").write_text(sums.replace(*hashes))


@pytest.mark.parametrize(("version", "words"), [(4, "format_version 4 was written by a newer megascale"),
                                                (2, "format_version 2 was written by an older megascale")])
def test_another_version_is_refused_and_stays_where_it_is(tmp_path, version, words):
    """Mutation seen to be caught: it counts as damaged, which quarantines every checkpoint of a run."""
    save_all(tmp_path, 2, cut_flat(make_tensors({"master/a": (3, 4)}), []))
    write_version(tmp_path, version, with_hash=True)
    with pytest.raises(CheckpointError, match=f"{words}; this one reads 3"):
        find_checkpoint(LocalStore(tmp_path), run_id="run-a", comm=LocalComm())
    assert (tmp_path / "checkpoints/step_00000002").is_dir()


def test_a_version_that_is_damage_is_damage(tmp_path):
    """Mutation seen to be caught: the version believed without its hash."""
    save_all(tmp_path, 2, cut_flat(make_tensors({"master/a": (3, 4)}), []))
    write_version(tmp_path, 4, with_hash=False)
    with pytest.raises(CheckpointError, match="no whole checkpoint is left"):
        find_checkpoint(LocalStore(tmp_path), run_id="run-a", comm=LocalComm())
