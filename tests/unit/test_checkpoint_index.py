"""The index: what it refuses, by file and field."""

import copy
import json
from dataclasses import asdict

import pytest

from megascale.checkpoint.find import read_stored_index
from megascale.checkpoint.folders import checkpoint_path
from megascale.checkpoint.index import CheckpointIndex, code_versions
from megascale.checkpoint.local_store import LocalStore
from megascale.checkpoint.records import parse_record, to_json
from megascale.errors import CheckpointError
from tests.support.checkpoint_ranks import cut_flat, make_tensors, save_all

KEY = "master/weight"
FILE = "rank_00000.safetensors"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    run_folder = tmp_path_factory.mktemp("run")
    save_all(run_folder, 3, cut_flat(make_tensors({KEY: (4, 6)}), [400_000]))
    return checkpoint_path(run_folder, 3)


@pytest.fixture
def values(written):
    return copy.deepcopy(json.loads((written / "index.json").read_text()))


def test_an_index_reads_back_as_it_was_written(written, values):
    index = read_stored_index(LocalStore(written.parents[1]), 3)
    assert to_json(asdict(index)) == to_json(values)
    assert index.state.step == 3
    assert index.tensors[KEY].shape == (4, 6)
    assert set(index.run.code) >= {"megascale", "torch", "deepspeed", "python"}


def damage(values, where, value):
    *path, last = where
    for step in path:
        values = values[step]
    values[last] = value


@pytest.mark.parametrize(
    ("where", "value", "field"),
    [
        (("format_version",), 1, "format_version"),
        (("format",), "other", "format"),
        (("extra",), 1, "extra"),
        (("run", "run_id"), None, "run.run_id"),
        (("run", "stream", "corpora", "web", "fingerprint"), 5, "run.stream.corpora.web.fingerprint"),
        (("run", "stream", "stages", 1, "counts", "web"), 0.5, "run.stream.stages.1.counts.web"),
        (("state", "ledger", "code", "tokens"), -1, "state.ledger.code"),
        (("state", "rows"), "many", "state.rows"),
        (("files", FILE, "sha256"), "abc", f"files.{FILE}.sha256"),
        (("files", FILE, "bytes"), 2, f"files.{FILE}.bytes"),
        (("files", "../evil.safetensors"), {"bytes": 1, "sha256": "0" * 64}, "files.../evil.safetensors"),
        (("tensors", KEY, "dtype"), "F8", f"tensors.{KEY}.dtype"),
        (("tensors", KEY, "shape"), [4, 7], f"tensors.{KEY}"),
        (("tensors", KEY, "shape"), [1] * 9, f"tensors.{KEY}.shape"),
        (("tensors", KEY, "slices", 0, "file"), "/etc/passwd", f"tensors.{KEY}"),
        (("tensors", KEY, "slices", 0, "file"), "rank_00007.safetensors", f"tensors.{KEY}"),
        (("tensors", KEY, "slices", 0, "starts"), [0], f"tensors.{KEY}.slices.0.stops"),
        (("tensors", KEY, "slices", 0, "starts"), [0, 0.0], f"tensors.{KEY}.slices.0.starts.1"),
        (("tensors", KEY, "slices", 0, "starts"), [1, 0], f"tensors.{KEY}"),
        (("tensors", KEY, "slices", 0, "stops"), [0, 0], f"tensors.{KEY}"),
        (("tensors", KEY, "slices", 0, "stops"), [10**30, 6], f"tensors.{KEY}.slices"),
        (("tensors", KEY, "slices"), [], f"tensors.{KEY}"),
    ],
)
def test_a_bad_value_is_refused_with_file_and_field(values, tmp_path, where, value, field):
    damage(values, where, value)
    with pytest.raises(CheckpointError) as refused:
        parse_record(CheckpointIndex, to_json(values), tmp_path / "index.json")
    assert str(refused.value).startswith(f"{tmp_path}/index.json: ")
    assert field in str(refused.value)


def test_two_slices_can_not_name_one_entry(values, tmp_path):
    slices = values["tensors"][KEY]["slices"]
    slices[1]["entry"], slices[1]["file"] = slices[0]["entry"], slices[0]["file"]
    with pytest.raises(CheckpointError, match="serves two slices"):
        parse_record(CheckpointIndex, to_json(values), tmp_path)


def test_code_versions_name_a_commit_only_when_it_is_known():
    assert "git_commit" not in code_versions()
    assert code_versions("abc")["git_commit"] == "abc"
