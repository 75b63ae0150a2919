"""Every config of a real target is legal on the GPUs that its name says, fits them, and its header tells the truth.

Mutations seen to be caught: gradients of 2 bytes; a pass less under way in interleaved_1f1b; the factor of passes
left out; a halved d_ff of llama-70b; a header left over from another micro-batch or tp; the input of a half kept when
offloaded.
"""

import re
from types import SimpleNamespace

import pytest

from bench.schedule_trace import torch_actions
from launcher.check import describe_memory
from megascale.config.derive import derive
from megascale.config.load import load_config
from megascale.config.schedules import takes_micro_batches
from megascale.engine import ds_config
from megascale.model import loss, memory
from megascale.model.flops import num_parameters
from tests.support.ranks import REPOSITORY

RUNS = {path.stem: path for path in sorted((REPOSITORY / "configs/run").glob("*.yaml"))}
REAL = {name: path for name, path in RUNS.items() if "xh100" in name}
H100_GIB = 79.6
"""What an H100 of 80 GB has."""
REST_FRACTION = 0.8
"""Largest part of it that a config may fill by formula; the rest is for what the formulas leave out."""
PUBLISHED = {
    "gpt2-124m": 124_439_808, "gpt2-1.5b": 1_557_611_200, "gpt3-175b": 175.0e9, "llama-1b": 1_235_814_400,
    "llama-8b": 8_030_261_248, "llama-70b": 70_553_706_496, "mixtral-8x7b": 46_702_792_704,
}


def derived_run(name: str):
    """A config and what follows from it on the GPUs of its name."""
    config, ranks = load_config(REAL[name], []), int(re.search(r"_(\d+)xh100", name)[1])
    return config, derive(config, ranks, name)


def test_the_targets_are_there():
    assert set(PUBLISHED) - {"gpt2-1.5b"} <= {name.split("_")[0] for name in REAL}
    assert {64, 256, 512, 1024} <= {derived_run(name)[1].world_size for name in REAL}
    assert any(derived_run(name)[0].train.seq_len == 131072 for name in REAL)


@pytest.mark.parametrize("name", REAL)
def test_the_header_says_what_check_computes_and_it_fits(name):
    config, derived = derived_run(name)
    lines = [line[1:].strip() for line in REAL[name].read_text().splitlines() if line.startswith("#")]
    assert f"Memory of a rank: {describe_memory(config, derived)}." in " ".join(lines)
    assert memory.fullest_rank(config, derived).total < REST_FRACTION * H100_GIB * memory.GIB


def test_the_table_of_the_docs_has_each_of_them():
    text = (REPOSITORY / "docs/targets.md").read_text()
    told = {name: (int(ranks.replace(",", "")), float(gib))
            for name, ranks, gib in re.findall(r"^\| (\S+xh100\S+) \| ([\d,]+) \|.*\| ([\d.]+) \|$", text, re.M)}
    runs = {name: derived_run(name) for name in REAL}
    found = {name: (derived.world_size, round(memory.fullest_rank(config, derived).total / memory.GIB, 2))
             for name, (config, derived) in runs.items()}
    assert told == found


@pytest.mark.parametrize("name", REAL)
def test_the_name_says_the_layout(name):
    config, derived = derived_run(name)
    sizes = {"tp": config.parallel.tp, "cp": config.parallel.cp, "pp": config.parallel.pp, "dp": derived.dp}
    named = {axis: int(size) for axis, size in re.findall(r"([a-z]+)(\d+)", name.split("_")[2])}
    assert named == {axis: size for axis, size in sizes.items() if size > 1 or axis in named}


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_have_as_many_parameters_as_published(name):
    rounding = 0.005 if name == "gpt3-175b" else 0  # whose paper gives four digits
    path = next(path for run, path in REAL.items() if run.startswith(f"{name}_") and "131072" not in path.read_text())
    found = num_parameters(load_config(path, []).model, has_padding=False)
    assert found == pytest.approx(PUBLISHED[name], rel=rounding)


@pytest.mark.parametrize(("schedule", "stages_per_rank", "pp", "micro_batches"), [
    (*driven, pp, micro_batches)
    for driven in (("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_1f1b", 3), ("zero_bubble", 1),
                   ("zero_bubble", 2), ("zero_bubble_v", 2), ("dualpipe_v", 2))
    for pp in (2, 3, 4) for micro_batches in (4, 10, 12)
    if takes_micro_batches(driven[0], pp, driven[1], micro_batches)
])
def test_as_many_passes_are_under_way_as_torchs_schedules_have(schedule, stages_per_rank, pp, micro_batches):
    """A pass ends with the gradients of its weights, which may come after those of its inputs."""
    for rank, actions in enumerate(torch_actions(schedule, pp, stages_per_rank, micro_batches)):
        held, most = 0, 0
        for action in actions:
            held += {"F": 1, "B": -1, "W": -1}.get(action.kind, 0)
            most = max(most, held)
        found = memory.passes_under_way(schedule, pp, stages_per_rank, micro_batches, rank)
        assert found == most if micro_batches >= 2 * pp else found >= most  # zero_bubble_v needs so many to be full


def test_figures_of_other_layers_are_the_same_there():
    assert memory.BUCKET_ELEMENTS == ds_config.BUCKET_ELEMENTS
    assert memory.LOGITS_ELEMENTS == loss.DEVICE_CHUNK_ELEMENTS


def test_a_config_for_a_cpu_is_told_in_mebibytes():
    config = load_config(RUNS["tiny_cpu_blend"], [])
    assert re.match(r"11\.\d\d MiB by formula: weights 0\.38 ", describe_memory(config, derive(config, 1, "tiny")))


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_less_is_kept_the_more_is_computed_again_or_offloaded(recompute, offload):
    """Activations of two blocks in one stage of gpt2-124m with 32 rows, by hand."""
    config, derived = derived_run("gpt2-124m_1xh100_dp1")
    train = config.train.model_copy(update={"recompute": recompute, "offload_activations": offload})
    rows, width = 32 * 1024, 768
    stream, products = rows * width * 2, rows * (3 + 4) * width * 2  # bf16; 3 D of qkv, 4 D of the wide product
    other = rows * (2 * width * 2 + 16 + 4 * 12 + (width + 4 * width) * 2)
    kept = {"none": 2 * stream + products + other, "selective": 2 * stream + products, "full": stream}[recompute]
    if offload:
        kept = products if recompute == "selective" else 0
    found = memory.fullest_rank(SimpleNamespace(**dict(config) | {"train": train}), derived)
    assert found.activations == 12 * kept + stream
