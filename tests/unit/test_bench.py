"""The benches run and print their tables. What they measure isn't tested: it is another on every machine.

Mutations seen to be caught: another learning rate in the plain loop (the losses differ); rows sliced one token further
(the labels differ).
"""

import os
import subprocess
import sys

import pytest

from tests.support.ranks import REPOSITORY


def bench_output(module: str, *arguments: str) -> str:
    """What a bench prints."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    shown = subprocess.run(
        [sys.executable, "-m", module, *arguments], env=environment, cwd=REPOSITORY, capture_output=True, text=True,
        timeout=120, check=False,
    )
    assert shown.returncode == 0, shown.stderr[-3000:]
    return shown.stdout


def run_bench(module: str, *arguments: str) -> list[list[str]]:
    """The cells of the rows of the table that a bench prints."""
    lines = bench_output(module, *arguments).splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    assert all(len(row) == len(head) for row in rows)
    return rows


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_step_overhead_prints_a_row_per_case(num_ranks):
    rows = run_bench(
        "bench.step_overhead", "--ranks", str(num_ranks), "--shapes", "d64", "--dtypes", "fp32", "bf16",
        "--seconds", "0.01",
    )
    assert [row[:2] + row[3:5] for row in rows] == [[str(num_ranks), "d64", dtype, "1"] for dtype in ("fp32", "bf16")]


def test_loader_prints_a_row_per_sequence_length():
    rows = run_bench(
        "bench.loader", "--tokens", "200000", "--block-tokens", "20000", "--passes", "2", "--seq-lens", "64", "256",
    )
    sides = ["slices", "rows", "loader", "webdataset"]
    assert [row[:2] for row in rows] == [[seq_len, side] for seq_len in ("64", "256") for side in sides]


def test_checkpoint_prints_how_it_was_saved_and_loaded():
    output = bench_output("bench.checkpoint", "--millions", "2", "--rounds", "1")
    for name in ("ours, asynchronous", "torch async_save, thread", "plain writes", "fill and check the digests"):
        assert f"| {name} |" in output
    assert "bytes on disk per parameter" in output
