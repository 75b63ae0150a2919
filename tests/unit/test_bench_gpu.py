"""The bench of one GPU, tried on the CPU and with loops that only pretend.

Mutations seen to be caught: the loops always in the same order; the ratio upside down; half the rows without twice the
accumulation; other numbers of blocks for the two loops; losses not compared; running out of memory not noticed. On the
toys: another learning rate in the plain loop, masters not copied back, the loss not divided by the accumulation.
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from bench import gpu
from tests.support.ranks import REPOSITORY
from tests.unit.test_bench import run_bench

SHAPE = replace(gpu.tiny_shapes()[0], rows=4, accumulation=2)


class FakeLoop:
    """Steps of 1 s of ours and 3 s of the other; no room beside another one, or above `most_rows`."""

    alive, order = 0, []

    def __init__(self, kind, shape, most_rows, has_room_for_two, loss=3.0):
        if shape.rows > most_rows or (FakeLoop.alive and not has_room_for_two):
            raise gpu.OutOfMemory("tried to take more than there is")
        FakeLoop.alive += 1
        self.kind, self.step_s = kind, 1.0 if kind == gpu.OURS else 3.0
        self.peak_bytes = 5
        self.facts = {
            "losses": [loss], "seconds": self.step_s, "peak_bytes": 5, "device_bytes": 12, "device": "NVIDIA H200",
        }

    def __enter__(self):
        return self

    def __exit__(self, *_):
        FakeLoop.alive -= 1

    def seconds(self, num_steps):
        FakeLoop.order.append(self.kind)
        return self.step_s * num_steps


def measure(seconds=12.0, most_rows=4, has_room_for_two=True):
    FakeLoop.alive, FakeLoop.order, notes = 0, [], []

    def start(kind, shape):
        return FakeLoop(kind, shape, most_rows, has_room_for_two)

    return gpu.measure(SHAPE, "masters", seconds, start, notes.append), notes


def cells(result):
    return dict(zip(gpu.COLUMNS, (cell.strip() for cell in gpu.show_result(result).strip("|").split("|")), strict=True))


def test_loops_side_by_side_take_turns():
    result, notes = measure()
    assert result.processes == "side by side"
    assert FakeLoop.order == ["ours", "masters", "masters", "ours"] * 2
    row = cells(result)
    assert row["ours, tok/s"] == f"{SHAPE.tokens_per_step}"
    assert row["ours / plain, tok/s"] == "3.000 (3.000 to 3.000)"
    assert (row["pairs"], row["anchor"]) == ("4", "-")
    assert not notes


def test_loops_that_do_not_fit_together_are_started_in_turn():
    result, notes = measure(seconds=24.0, has_room_for_two=False)
    assert result.processes == "in turn"
    half = len(FakeLoop.order) // 4
    assert FakeLoop.order == (["ours"] * half + ["masters"] * half) * 2
    assert FakeLoop.alive == 0
    assert cells(result)["pairs"] == str(2 * half)
    assert not notes


def test_out_of_memory_halves_the_micro_batch_and_says_so():
    result, notes = measure(most_rows=1)
    assert (result.shape.rows, result.shape.accumulation) == (1, 8)
    assert result.shape.tokens_per_step == SHAPE.tokens_per_step
    assert [note.split("; ")[1] for note in notes] == [
        "now 2 x accumulation 4, recompute none", "now 1 x accumulation 8, recompute none"
    ]


def test_out_of_memory_with_one_row_recomputes_more_and_then_gives_up():
    tried = [replace(SHAPE, rows=1)]
    while (less := gpu.smaller(tried[-1])) is not None:
        tried.append(less)
    assert [shape.recompute for shape in tried] == ["none", "selective", "full"]
    with pytest.raises(gpu.OutOfMemory):
        measure(most_rows=0)


def test_loops_that_train_differently_are_not_compared():
    loops = [FakeLoop(kind, SHAPE, 4, True, loss) for kind, loss in ((gpu.OURS, 3.0), ("masters", 3.2))]
    with pytest.raises(AssertionError, match="the loops differ"):
        gpu.take_turns(SHAPE, *loops, seconds=1.0)


def test_shapes_are_those_of_the_issue():
    shapes = {shape.name: shape.config(is_compiled=True) for shape in gpu.list_shapes()}
    sizes = {name: (round(gpu.num_parameters(config.model) / 1e6), config.train.seq_len)
             for name, config in shapes.items()}
    assert sizes == {
        "gpt2-124m": (124, 1024), "gpt2-1.5b": (1558, 1024), "llama-1b-2k": (1236, 2048), "llama-1b-8k": (1236, 8192),
        "llama-3b-2k": (3213, 2048), "llama-3b-8k": (3213, 8192),
    }


@pytest.mark.parametrize(("shape", "against"), [
    ("tiny-gpt2", "masters"), pytest.param("tiny-llama", "autocast", marks=pytest.mark.slow),
])
def test_a_toy_runs_on_a_cpu(shape, against):
    rows = run_bench("bench.gpu", "--shape", shape, "--eager", "--seconds", "0.01", "--against", against)
    assert [(row[0], row[-2]) for row in rows] == [(shape, "side by side")]


def test_without_a_gpu_it_says_so_in_one_line():
    shown = subprocess.run(
        [sys.executable, "-m", "bench.gpu"], env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, cwd=REPOSITORY,
        capture_output=True, text=True, timeout=120, check=False,
    )
    assert shown.returncode == 1
    assert shown.stdout == ""
    (line,) = shown.stderr.splitlines()
    assert "torch sees none" in line
