"""The same code on a CUDA device: parity with the plain fp32 loop, and runs through the CLI.

One GPU gives one rank, so collectives over NCCL are called but move nothing; more need more GPUs.
"""

import json

import pytest
import torch

from tests.dist.test_zero_parity import LOW_PRECISION_TOLERANCE
from tests.support.corpus import make_corpus
from tests.support.ranks import run_ranks
from tests.support.tiny_run import megascale, read_metrics, write_config

pytestmark = [
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FP32_TOLERANCE = 2e-4
"""CUDA sums in another order than the CPU, and 20 steps amplify it; TF32 is off by default."""


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_each_stage_matches_the_plain_cpu_loop(dtype, tmp_path):
    cases = [{"zero_stage": stage, "dtype": dtype, "micro_batch_size": 4} for stage in range(4)]
    output = run_ranks("tests.dist.programs.zero_parity", 1, [json.dumps(cases)], tmp_path, 300, on_gpu=True)
    tolerance = LOW_PRECISION_TOLERANCE.get(dtype, (FP32_TOLERANCE, FP32_TOLERANCE))
    for result in map(json.loads, output[0].splitlines()):
        assert result["loss_gap"] <= tolerance[0], result
        assert result["norm_gap"] <= tolerance[1], result


@pytest.mark.parametrize("options", [[], ["train.compile=true"], ["train.recompute=selective"]], ids=str)
def test_a_run_through_the_command_line(options, tmp_path):
    config = write_config(tmp_path, make_corpus(tmp_path / "corpus", vocab_size=64))
    done = megascale("train", config, "precision.dtype=bf16", *options, "--nproc", "1", timeout_s=600,
                     CUDA_VISIBLE_DEVICES="0")
    assert done.returncode == 0, done.stderr
    losses = [line["loss"] for line in read_metrics(tmp_path / "run") if line["kind"] == "train"]
    assert losses[-1] < losses[0]
