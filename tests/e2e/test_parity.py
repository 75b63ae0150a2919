"""`megascale parity` from the command line: layouts that agree, faults that it finds, and what it refuses.

Each planted fault is a mutation of tensor parallelism that the command is seen to locate: step, phase and tensor.
"""

import json
import os
import subprocess
import sys

import pytest

from megascale.train.compare_traces import Adam, compare_traces
from megascale.train.trace_files import TraceFolder
from tests.support.ranks import REPOSITORY, run_ranks
from tests.support.tiny_run import command_environment, megascale, write_config

FAULT_MODULE = "tests.e2e.programs.parity_fault"


@pytest.fixture(scope="module")
def config(corpus, tmp_path_factory):
    """The tiny config, with a run folder that nothing has made."""
    return write_config(tmp_path_factory.mktemp("parity"), corpus)


def trace(config, folder, ranks, module="megascale.train.parity", leader=None, steps=2, overrides=()) -> TraceFolder:
    """The trace of one layout."""
    request = {"config": str(config), "overrides": list(overrides), "steps": steps, "folder": str(folder),
               "leader": leader}
    run_ranks(module, ranks, [json.dumps(request)], folder.parent)
    return TraceFolder(folder)


@pytest.fixture(scope="module")
def one_rank(config, tmp_path_factory):
    """The trace of one rank."""
    return trace(config, tmp_path_factory.mktemp("traces") / "a", 1)


def test_two_layouts_agree_and_the_run_folder_is_left_alone(config):
    done = megascale("parity", config, "--layout", "dp2,zero2", "--layout", "tp2,micro_batch_size=4", "--steps", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "within 1e-06 (for fp32)" in done.stdout
    assert not (config.parent / "run").exists()


def test_what_computes_the_same_in_the_same_order_is_equal_to_the_bit(config, tmp_path):
    done = megascale(
        "parity", config, "--layout", "dp1", "--layout", "dp1,recompute=full", "--steps", "1", "--keep", tmp_path / "t"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal to the bit in every step and phase" in done.stdout
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == ["a", "b"]


def test_a_planted_fault_is_located_by_the_command(config):
    arguments = ["parity", str(config), "--layout", "dp1", "--layout", "tp2", "--steps", "1"]
    fault = {"MEGASCALE_TEST_FAULT": "norm gradients not summed over tp"}
    done = subprocess.run(
        [sys.executable, "-m", FAULT_MODULE, *arguments], env=command_environment(**fault), cwd=REPOSITORY,
        capture_output=True, text=True, timeout=240, check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "first difference over 1e-06 (for fp32): step 1, gradient of final_norm.weight: " in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "phase", "name"), [
    ("initial weight", "start", "blocks.1.feed_forward.output.weight"),
    ("forward", "forward", "blocks.1"),
    ("clipping on one rank", "update", "embedding.tokens.weight (exp_avg)"),
    ("norms decay", "update", "blocks.0.attention_norm.weight (master)"),
])
def test_each_phase_names_its_own_fault(config, one_rank, tmp_path, monkeypatch, fault, phase, name):
    monkeypatch.setitem(os.environ, "MEGASCALE_TEST_FAULT", fault)
    spoilt = trace(config, tmp_path / "b", 2, FAULT_MODULE, str(one_rank.path), 1, ["parallel.tp=2"])
    found = compare_traces(one_rank, spoilt, 1, Adam(0.9, 0.95, 1e-8), b_follows=True)
    first = next(each for each in found if each.relative > 1e-6)
    assert (first.step, first.phase, first.name) == (1, phase, name)


@pytest.mark.parametrize(("arguments", "said"), [
    (["--layout", "dp1"], "--layout is given 1 times; give it twice"),
    (["--layout", "dp1", "--layout", "tp4"], "parallel.tp = 4 does not divide model.num_heads = 2"),
    (["--layout", "dp1", "--layout", "dp3"], "with --layout dp3"),
    (["--layout", "dp1", "--layout", "dp512"], "--layout dp512 is one of 512 ranks"),
    (["--layout", "dp1", "--layout", "tp2", "--steps", "13"], "--steps 13"),
    (["--layout", "dp1", "--layout", "tp2", "data.folder=nowhere"], "nowhere"),
])
def test_bad_input_is_refused_before_anything_runs(config, arguments, said):
    done = megascale("parity", config, *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr
    assert "steps under" not in done.stdout
