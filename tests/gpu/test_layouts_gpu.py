"""What a run computes on GPUs is what the plain fp32 loop computes on the CPU: masks, compilation, recompute, fp8,
offload; over NCCL with two GPUs or more also the layouts.

The tolerances of bf16, fp16 and fp8 are 4 times the largest gap that the same program showed on a CPU, where the
products are rounded to the same formats. What they must tell apart is far above them: leaving out the document mask
moves the loss by 2e-2 and the gradient norm by 1e-1, the window the norm by 2e-1, dropout the loss by 2e-2. fp32 has
the tolerance of `test_gpu.py`.
"""

import json

import pytest
import torch

from megascale.model.fp8 import MIN_CAPABILITY
from tests.support.ranks import run_ranks

pytestmark = [
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOLERANCE = {"fp32": (2e-4, 2e-4), "bf16": (3e-3, 2.4e-2), "fp16": (2e-4, 2e-3), "fp8": (3e-3, 1e-1)}
"""(loss, gradient norm)."""
FP32, FP16 = {"precision": {"dtype": "fp32"}}, {"precision": {"dtype": "fp16"}}
COMPILED = {"train": {"compile": True}}
DOCUMENTS, WINDOW = {"data": {"document_mask": True}}, {"model": {"window": 100}}
GPT2 = {"model": {"family": "gpt2", "dropout": 0.1}}
MASKS = [{}, DOCUMENTS, WINDOW, DOCUMENTS | WINDOW, GPT2, GPT2 | DOCUMENTS]
RECOMPUTE = [
    {"recompute": "selective"}, {"recompute": "selective", "recompute_parts": ["attention"]}, {"recompute": "full"},
    {"recompute": "full", "recompute_every": 2},
]


def merge(*cases: dict) -> dict:
    """The sections of all, the last one first where they say different things."""
    sections = {name for case in cases for name in case}
    return {name: {key: value for case in cases for key, value in case.get(name, {}).items()} for name in sections}


def check(cases: list[dict], folder, num_ranks: int = 1) -> None:
    output = run_ranks(
        "tests.dist.programs.device_parity", num_ranks, [json.dumps(cases)], folder, 120 + 60 * len(cases), on_gpu=True
    )
    results = [json.loads(line) for line in output[0].splitlines()]
    assert [result["case"] for result in results] == cases
    for result in results:
        precision = result["case"].get("precision", {})
        loss, norm = TOLERANCE["fp8" if precision.get("fp8_linear") else precision.get("dtype", "bf16")]
        assert result["device"] == "cuda"
        assert result["min_norm"] > 0.5, "clipping must be active in every step"
        assert max(result["loss_gap"], result["eval_gap"]) <= loss, result
        assert result["norm_gap"] <= norm, result


@pytest.mark.parametrize("compiled", [{}, COMPILED], ids=["eager", "compiled"])
@pytest.mark.parametrize("precision", [{}, FP32, FP16], ids=["bf16", "fp32", "fp16"])
def test_masks_and_dropout(precision, compiled, tmp_path):
    check([merge(case, precision, compiled) for case in MASKS], tmp_path)


@pytest.mark.parametrize("compiled", [{}, COMPILED], ids=["eager", "compiled"])
def test_recompute(compiled, tmp_path):
    cases = [merge(model, {"train": mode}, compiled) for mode in RECOMPUTE for model in (DOCUMENTS, GPT2)]
    check(cases, tmp_path)


@pytest.mark.parametrize("compiled", [{}, COMPILED], ids=["eager", "compiled"])
def test_offloaded_activations(compiled, tmp_path):
    offloaded = {"train": {"offload_activations": True}}
    modes = [{}, {"train": {"recompute": "selective"}}, {"train": {"recompute": "full"}}]
    check([merge(model, offloaded, mode, compiled) for mode in modes for model in ({}, DOCUMENTS)], tmp_path)


def test_offloaded_optimizer(tmp_path):
    stages = [{"parallel": {"offload_optimizer": "cpu", "zero_stage": stage}} for stage in range(4)]
    check([*stages, *(merge(stage, FP16) for stage in stages)], tmp_path)


def test_compiled_blocks_under_each_zero_stage(tmp_path):
    check([merge(COMPILED, {"parallel": {"zero_stage": stage}}) for stage in range(4)], tmp_path)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < MIN_CAPABILITY, reason="fp8 needs Hopper"
)
@pytest.mark.parametrize("compiled", [{}, COMPILED], ids=["eager", "compiled"])
def test_fp8(compiled, tmp_path):
    fp8 = {"precision": {"fp8_linear": True}}
    cases = [fp8, merge(fp8, GPT2), merge(fp8, {"train": {"recompute": "selective"}}),
             merge(fp8, {"parallel": {"zero_stage": 3}})]
    check([merge(case, compiled) for case in cases], tmp_path)


LAYOUTS = [
    {"tp": 2}, {"tp": 2, "sequence_parallel": False}, {"pp": 2}, {"cp": 2},
    {"cp": 2, "context_attention": "ulysses"}, {"tp": 2, "zero_stage": 3}, {"zero_stage": 0}, {"zero_stage": 1},
    {"zero_stage": 2}, {"zero_stage": 3},
]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts_over_nccl(layout, tmp_path):
    models = ({}, DOCUMENTS, GPT2, FP32, COMPILED)
    one_row = {"train": {"micro_batch_size": 1}}
    check([merge(model, one_row, {"parallel": layout}) for model in models], tmp_path, num_ranks=2)


SCHEDULES = ("gpipe", "interleaved_1f1b", "zero_bubble", "zero_bubble_v", "dualpipe_v")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_over_nccl(schedule, tmp_path):
    deep = {"model": {"num_layers": 4}, "train": {"micro_batch_size": 1}}
    check([merge(deep, {"parallel": {"pp": 2, "schedule": schedule}}, model) for model in ({}, DOCUMENTS)], tmp_path, 2)


@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four GPUs")
@pytest.mark.parametrize("layout", [{"tp": 2, "zero_stage": 3}, {"tp": 2, "pp": 2}, {"tp": 2, "cp": 2}], ids=str)
def test_mixed_layouts_over_nccl(layout, tmp_path):
    one_row = {"train": {"micro_batch_size": 1}}
    check([merge(model, one_row, {"parallel": layout}) for model in ({}, DOCUMENTS)], tmp_path, num_ranks=4)
