"""The format's document: its reader works on a real checkpoint, and its tables name every field there is."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

from megascale.checkpoint.files import FileRecord
from megascale.checkpoint.folders import checkpoint_path
from megascale.checkpoint.index import (
    MAX_DIMS,
    MAX_JSON_BYTES,
    Change,
    CheckpointIndex,
    LineageRecord,
    ProbeRecord,
    RunRecord,
    SliceRecord,
    TensorRecord,
)
from megascale.checkpoint.state import RunState
from tests.support.checkpoint_ranks import cut_flat, make_tensors, save_all

DOCUMENT = (Path(__file__).parents[2] / "docs" / "checkpoint_format.md").read_text()


def test_the_reader_of_the_document_reads_a_checkpoint(tmp_path):
    tensors = make_tensors({"master/a": (7, 5), "exp_avg/a": (7, 5), "master/b": ()})
    save_all(tmp_path, 6, cut_flat(tensors, [200_000, 700_000]))
    snippet, = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    assert len(snippet.splitlines()) <= 25
    done = subprocess.run(
        [sys.executable, "-", checkpoint_path(tmp_path, 6)], input=snippet, capture_output=True, text=True, check=True,
    )
    expected = [f"{key} {tuple(tensor.shape)} {tensor.numpy().mean()!s}" for key, tensor in sorted(tensors.items())]
    assert done.stdout.splitlines() == expected


def test_the_document_names_every_field():
    prefixes = {
        CheckpointIndex: "", RunRecord: "run.", RunState: "state.", FileRecord: "", TensorRecord: "",
        SliceRecord: "slices[].", LineageRecord: "run.lineage[].", Change: "run.lineage[].changes[].", ProbeRecord: "",
    }
    for record, prefix in prefixes.items():
        for field in dataclasses.fields(record):
            assert f"`{prefix}{field.name}`" in DOCUMENT, (record, field.name)
    assert f"at most {MAX_JSON_BYTES >> 20} MiB" in DOCUMENT
    assert f"at most {MAX_DIMS} dims" in DOCUMENT
