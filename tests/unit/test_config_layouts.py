"""Which layouts `check` refuses, in which words, and that the layouts it proposes instead are legal."""

import doctest
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torch_schedules

from launcher.check import describe_stages
from megascale.config import layout_rules
from megascale.config import schedules as schedules_module
from megascale.config.derive import derive, describe
from megascale.config.load import load_config
from megascale.config.schedules import SCHEDULES, nearest_micro_batches, takes_micro_batches
from megascale.config.schema import RunConfig
from megascale.errors import ConfigError
from megascale.model.flops import forward_flops_per_token, layer_costs
from tests.support.ranks import REPOSITORY
from tests.support.tiny_run import write_config

SHAPE = ("model.num_layers=4", "model.d_model=64", "model.num_heads=8", "model.num_kv_heads=4", "model.d_ff=96",
         "train.micro_batch_size=1", "train.global_batch_tokens=512")
"""4 blocks, 8 heads, 4 key-value heads, d_ff 96, 64 vocabulary rows, rows of 32 tokens, 16 rows a step."""

TORCH_CLASSES = {
    "gpipe": torch_schedules.ScheduleGPipe,
    "1f1b": torch_schedules.Schedule1F1B,
    "interleaved_1f1b": torch_schedules.ScheduleInterleaved1F1B,
    "zero_bubble": torch_schedules.ScheduleInterleavedZeroBubble,
    "zero_bubble_v": torch_schedules.ScheduleZBVZeroBubble,
    "dualpipe_v": torch_schedules.ScheduleDualPipeV,
}

REFUSED = [
    (8, "parallel.tp=3", "8 ranks can't hold whole replicas of tp 3 x pp 1 x cp 1 = 3 ranks; use 6 or 9 ranks"),
    (2, "parallel.pp=4", "2 ranks can't hold whole replicas of tp 1 x pp 4 x cp 1 = 4 ranks; use 4 ranks"),
    (2, "parallel.pp=2 parallel.zero_stage=2", "parallel.zero_stage = 2 with parallel.pp = 2: a pipeline needs whole"
     " gradients until its last micro-batch, so only ZeRO 0 and 1 go with it; use zero_stage 1"),
    (3, "parallel.tp=3", "parallel.tp = 3 does not divide model.num_heads = 8; use one of 1, 2, 4, 8"),
    (6, "parallel.tp=6 model.num_heads=12 model.d_model=96",
     "parallel.tp = 6 neither divides model.num_kv_heads = 4 nor is a multiple of it: a rank holds whole key-value"
     " heads, or shares one with as many ranks as every other; use one of 1, 2, 4, 12"),
    (8, "parallel.tp=8 model.d_ff=100",
     "parallel.tp = 8 does not divide model.d_ff = 100; use tp 5 or 10, or a d_ff of 96 or 104"),
    (8, "parallel.tp=8 model.vocab_multiple=4 model.vocab_size=50",
     "parallel.tp = 8 does not divide the 52 rows of the padded vocabulary (model.vocab_size 50 rounded up to a"
     " multiple of model.vocab_multiple 4); use tp 4 or 13, or vocab_multiple 8"),
    (4, "parallel.cp=4 train.seq_len=28 train.global_batch_tokens=448",
     "train.seq_len = 28 with parallel.cp = 4: ring attention deals a row out in 2 x cp = 8 equal chunks, two to a"
     " rank, so that all have the same work under a causal mask; use a seq_len of 24 or 32"),
    (4, "parallel.cp=4 parallel.context_attention=ulysses train.seq_len=30 train.global_batch_tokens=480",
     "train.seq_len = 30 with parallel.cp = 4: ulysses deals a row out in 4 equal parts; use a seq_len of 28 or 32"),
    (8, "parallel.tp=4 parallel.cp=2 train.seq_len=20 train.global_batch_tokens=320",
     "train.seq_len = 20 / cp 2 = 10 positions don't divide by parallel.tp = 4, and sequence parallelism (on by default"
     " when tp > 1) deals them out evenly; use a seq_len of 16 or 24, or sequence_parallel: false"),
    (4, "parallel.tp=4 parallel.sequence_parallel=true train.seq_len=30 train.global_batch_tokens=480",
     "train.seq_len = 30 / cp 1 = 30 positions don't divide by parallel.tp = 4, and sequence parallelism deals them out"
     " evenly; use a seq_len of 28 or 32, or sequence_parallel: false"),
    (8, "parallel.tp=4 parallel.cp=4 parallel.context_attention=ulysses",
     "parallel.cp = 4 does not divide model.num_heads / tp = 8 / 4 = 2, and ulysses gives each cp rank whole heads; use"
     " one of 1, 2, or context_attention: ring"),
    (8, "parallel.pp=8", "model.num_layers = 4 can't fill 8 stages (parallel.pp 8 x 1 per rank of 1f1b), one block or"
     " more for each; use pp of at most 4, or num_layers of 8 or more"),
    (4, "parallel.pp=4 parallel.schedule=zero_bubble_v",
     "model.num_layers = 4 can't fill 8 stages (parallel.pp 4 x 2 per rank of zero_bubble_v), one block or more for"
     " each; use pp of at most 2, or fewer virtual_stages, or num_layers of 8 or more"),
    (2, "parallel.stage_layers=[2,2]",
     "parallel.stage_layers = [2, 2] has no stages to share out, since parallel.pp = 1; leave it out, or use pp 2"),
    (2, "parallel.pp=2 parallel.stage_layers=[1,1,2]", "parallel.stage_layers = [1, 1, 2] names 3 stages, and pp 2 x 1"
     " per rank are 2; give 2 numbers, or leave it out"),
    (2, "parallel.pp=2 parallel.stage_layers=[2,3]",
     "parallel.stage_layers = [2, 3] adds up to 5 blocks, and model.num_layers = 4; share out 4, or leave it out"),
    (4, "parallel.pp=4 train.micro_batch_size=8", "parallel.schedule = 1f1b can't run 2 micro-batches"
     " (global_batch_tokens 512 / 256) over pp 4: it starts with one micro-batch in each of its 4 stages, so it needs 4"
     " or more; use a global_batch_tokens of 1024 (4 micro-batches), or micro_batch_size 4 (4 micro-batches), or"
     " schedule gpipe"),
    (2, "parallel.pp=2 parallel.schedule=dualpipe_v train.micro_batch_size=8 train.compile=true",
     "it starts with one micro-batch in each of its 4 stages, so it needs 4 or more; use a global_batch_tokens of 1024"
     " (4 micro-batches), or micro_batch_size 4 (4 micro-batches), or schedule interleaved_1f1b"),
    (2, "parallel.pp=2 parallel.schedule=interleaved_1f1b train.global_batch_tokens=160",
     "parallel.schedule = interleaved_1f1b can't run 5 micro-batches (global_batch_tokens 160 / 32) over pp 2: it runs"
     " rounds of 2 or more, here 2, of the same size, and 2 must divide their number; use a global_batch_tokens of 128"
     " (4 micro-batches) or 192 (6 micro-batches), or micro_batch_size 5 (1 micro-batches), or schedule zero_bubble_v"),
    (2, "parallel.pp=2 parallel.schedule=zero_bubble train.compile=true",
     "train.compile with parallel.schedule = zero_bubble: it puts weight gradients off until a rank has nothing better"
     " to do, a side effect that a compiled block can't have; use compile: false, or schedule 1f1b or"
     " interleaved_1f1b"),
]

MISUSED = [
    ("parallel.virtual_stages=2", "parallel.virtual_stages = 2: schedule 1f1b drives exactly 1 on each rank; leave it"
     " out, or use schedule interleaved_1f1b or zero_bubble or zero_bubble_v or dualpipe_v"),
    ("parallel.virtual_stages=3 parallel.schedule=dualpipe_v", "schedule dualpipe_v drives exactly 2 on each rank"),
    ("parallel.virtual_stages=1 parallel.schedule=interleaved_1f1b",
     "schedule interleaved_1f1b drives 2 or more on each rank; leave it out, or use schedule gpipe or 1f1b or"
     " zero_bubble"),
    ("parallel.offload_optimizer=nvme parallel.zero_stage=3", "a checkpoint in global coordinates can't be written; use"
     " offload_optimizer: cpu"),
    ("precision.fp8_linear=true", "precision.fp8_linear with precision.dtype = fp32: the 8-bit products give bf16"),
    ("train.recompute=full train.recompute_parts=[attention]", "train.recompute_parts = ['attention'] says which half"
     " train.recompute = selective covers, and recompute is full; use recompute: selective, or leave the parts out"),
    ("train.recompute_every=2", "train.recompute_every = 2 has nothing to recompute, since train.recompute = none"),
    ("train.recompute=selective train.recompute_parts=[]", "train.recompute_parts"),
    ("parallel.stage_layers=[0,4]", "parallel.stage_layers.0 = 0 (int): input should be greater than or equal to 1"),
    ("parallel.schedule=1f1b1", "parallel.schedule = '1f1b1'"),
    ("model.window=0", "model.window = 0"),
]

LEGAL = [
    (8, "parallel.tp=8"),  # two ranks share each key-value head
    (8, "parallel.tp=2 parallel.cp=2 parallel.pp=2"),
    (4, "parallel.cp=4 parallel.context_attention=ulysses data.document_mask=true model.window=8"),
    (4, "parallel.tp=4 parallel.sequence_parallel=false train.seq_len=30 train.global_batch_tokens=480"),
    (2, "parallel.pp=2 parallel.stage_layers=[1,3]"),
    (2, "parallel.pp=2 parallel.schedule=zero_bubble parallel.virtual_stages=1 parallel.zero_stage=0"),
    (2, "parallel.pp=2 parallel.schedule=dualpipe_v parallel.stage_layers=[1,1,1,1]"),
    (2, "parallel.pp=2 parallel.schedule=gpipe train.micro_batch_size=16"),
    (1, "parallel.schedule=zero_bubble train.compile=true"),  # without a pipeline there is nothing to put off
    (2, "parallel.zero_stage=3 parallel.offload_optimizer=cpu parallel.tp=2"),
    (2, "parallel.pp=2 parallel.offload_optimizer=cpu precision.dtype=bf16 precision.fp8_linear=true"),
    (1, "train.recompute=selective train.recompute_parts=[feed_forward] train.recompute_every=2"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"), Path("corpus"))


def config_of(base: Path, overrides: str = "") -> RunConfig:
    return load_config(base, [*SHAPE, *overrides.split()])


def refusal(base: Path, overrides: str, num_ranks: int) -> str:
    with pytest.raises(ConfigError) as caught:
        derive(config_of(base, overrides), num_ranks)
    return str(caught.value)


@pytest.mark.parametrize(("num_ranks", "overrides", "line"), REFUSED)
def test_an_illegal_layout_is_refused_in_one_line_with_its_numbers(base, num_ranks, overrides, line):
    *rules, proposals = refusal(base, overrides, num_ranks).splitlines()
    assert any(line in rule for rule in rules), rules
    assert proposals.startswith((f"the nearest legal layouts of {num_ranks} ranks: tp", "no tp, pp and cp over"))


@pytest.mark.parametrize(("overrides", "line"), MISUSED)
def test_settings_that_contradict_each_other_are_refused(base, overrides, line):
    with pytest.raises(ConfigError) as caught:
        config_of(base, overrides)
    assert line in str(caught.value)


@pytest.mark.parametrize(("num_ranks", "overrides"), LEGAL)
def test_legal_layouts_at_the_edge_of_a_rule(base, num_ranks, overrides):
    derived = derive(config_of(base, overrides), num_ranks)
    assert derived.dp * layout_rules.num_model_ranks(config_of(base, overrides).parallel) == num_ranks


def test_the_nearest_layouts_are_named_nearest_first(base):
    assert refusal(base, "parallel.tp=2 parallel.pp=8", 16).endswith(
        "the nearest legal layouts of 16 ranks: tp 2 x pp 4 x cp 1 x dp 2; tp 2 x pp 4 x cp 2 x dp 1;"
        " tp 4 x pp 4 x cp 1 x dp 1"
    )
    assert "tp 1 x pp 2 x cp 1 x dp 1 without stage_layers" in refusal(
        base, "parallel.pp=2 parallel.stage_layers=[2,3]", 2
    )
    message = refusal(base, "parallel.tp=7 train.global_batch_tokens=32", 7)
    assert message.endswith("no tp, pp and cp over 7 ranks go with the rest of this config")


@given(
    world_size=st.integers(1, 24), tp=st.integers(1, 8), pp=st.integers(1, 8), cp=st.integers(1, 4),
    zero_stage=st.integers(0, 3), schedule=st.sampled_from(list(SCHEDULES)), rows=st.integers(1, 48),
    stage_layers=st.sampled_from([None, (1, 3), (1, 1, 1, 1)]), is_compiled=st.booleans(),
    context_attention=st.sampled_from(["ring", "ulysses"]),
)
@settings(deadline=None, max_examples=150)
def test_every_proposed_layout_is_accepted_and_never_one_that_was_refused(
    base, world_size, rows, is_compiled, **parallel
):
    config = config_of(base, f"train.global_batch_tokens={rows * 32} train.compile={is_compiled}".lower())
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update=parallel)})
    if not layout_rules.layout_problems(config, world_size):
        return
    proposals = layout_rules.nearest_layouts(config, world_size)
    assert len(set(proposals)) == len(proposals) <= layout_rules.MAX_PROPOSALS
    for proposal in proposals:
        derive(config.model_copy(update={"parallel": proposal}), world_size)
    kept = {"zero_stage", "schedule", "context_attention"}
    assert all(getattr(proposal, name) == parallel[name] for proposal in proposals for name in kept)
    assert config.parallel not in proposals


def fake_stage(pp: int, stages_per_rank: int, index: int) -> SimpleNamespace:
    return SimpleNamespace(
        group_size=pp, group_rank=0, num_stages=pp * stages_per_rank, stage_index=index * pp, submod=None,
        is_first=index == 0, is_last=False, has_backward=False, chunks=None,
    )


def torch_takes(schedule: str, pp: int, stages_per_rank: int, num_micro_batches: int) -> bool:
    stages = [fake_stage(pp, stages_per_rank, index) for index in range(stages_per_rank)]
    is_single = schedule in ("gpipe", "1f1b")
    try:
        TORCH_CLASSES[schedule](stages[0] if is_single else stages, num_micro_batches, loss_fn=lambda *_: None)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_micro_batch_rules_are_those_of_the_schedules_themselves(schedule):
    rules = SCHEDULES[schedule]
    for pp in (2, 3, 4):
        for stages_per_rank in range(rules.min_stages_per_rank, (rules.max_stages_per_rank or 3) + 1):
            legal = [n for n in range(1, 11) if takes_micro_batches(schedule, pp, stages_per_rank, n)]
            assert legal == [n for n in range(1, 11) if torch_takes(schedule, pp, stages_per_rank, n)]
            for number in set(range(1, 10)) - set(legal):
                nearest = nearest_micro_batches(schedule, pp, stages_per_rank, number)
                assert nearest == sorted(n for n in nearest if takes_micro_batches(schedule, pp, stages_per_rank, n))
                assert not any(nearest[0] < n < nearest[-1] for n in legal)


def test_the_examples_in_the_documentation():
    assert doctest.testmod(schedules_module).failed == 0


def test_v_schedules_drive_exactly_two_stages():
    for schedule in ("zero_bubble_v", "dualpipe_v"):
        assert not torch_takes(schedule, 2, 1, 8)
        assert not torch_takes(schedule, 2, 3, 8)
        assert SCHEDULES[schedule].min_stages_per_rank == SCHEDULES[schedule].max_stages_per_rank == 2


def test_defaults_that_depend_on_other_fields(base):
    def parallel(overrides: str):
        return config_of(base, overrides).parallel

    assert not parallel("parallel.sequence_parallel=true").is_sequence_parallel
    assert parallel("parallel.tp=2").is_sequence_parallel
    assert not parallel("parallel.tp=2 parallel.sequence_parallel=false").is_sequence_parallel
    assert parallel("parallel.schedule=zero_bubble").num_stages == 1
    assert parallel("parallel.schedule=zero_bubble parallel.pp=2").num_stages == 4
    assert parallel("parallel.schedule=zero_bubble parallel.pp=2 parallel.virtual_stages=1").num_stages == 2
    assert parallel("parallel.pp=4").stages_per_rank == 1


def test_derived_numbers_are_printed_with_their_factors(base):
    config = config_of(base, "parallel.tp=4 parallel.cp=2 parallel.pp=2 parallel.schedule=dualpipe_v"
                             " model.num_kv_heads=2 train.recompute=selective train.recompute_parts=[attention]"
                             " train.recompute_every=2")
    derived = derive(config, 32)
    lines = dict(describe(config, derived))
    assert (derived.num_stages, derived.attention_columns, derived.residual_columns) == (4, 16, 4)
    assert lines["tensor parallel"] == (
        "each of tp 4 ranks: 8 / 4 = 2 heads, 1 of 2 kv heads, shared by 2 ranks, d_ff 96 / 4 = 24, vocabulary 64 / 4 ="
        " 16 rows"
    )
    assert lines["context parallel"] == "ring attention over seq_len 32 / cp 2 = 16 positions"
    assert lines["sequence parallel"] == (
        "norms, dropout and residual on seq_len 32 / cp 2 / tp 4 = 4 positions, by default"
    )
    assert lines["pipeline"] == "4 stages = pp 2 x 2 per rank by default, schedule dualpipe_v, micro-batches a step: 8"
    assert lines["sharding"] == "ZeRO-1 over dp 2 x cp 2 = 4"
    assert lines["recompute"] == "selective (attention), one block in 2"


def test_the_costs_of_the_layers_add_up_to_the_forward_pass(base):
    """But for one operation per feature of the embedding and of the final norm, which the convention leaves out."""
    model = config_of(base).model
    costs = layer_costs(model, 32)
    assert len(costs) == model.num_layers + 3
    assert sum(costs) == forward_flops_per_token(model, 32) + 2 * model.d_model
    assert costs[-1] == 2 * model.d_model * model.padded_vocab_size


def test_the_split_into_stages_is_printed(base):
    def stages(overrides: str) -> dict[str, str]:
        config = config_of(base, overrides)
        return dict(describe_stages(config, derive(config, 2)))

    assert stages("") == {}
    assert stages("parallel.pp=2 parallel.stage_layers=[1,3]")["blocks per stage"].startswith("[1, 3] by hand")
    by_cost = stages("parallel.pp=2")
    assert by_cost["blocks per stage"].startswith("[2, 2] by cost; the dearest stage does 1.")
    assert by_cost["idle at best"].startswith("5.9% of a step")  # (p-1) / (m+p-1) = 1 / 17
    assert "idle at best" not in stages("parallel.pp=2 parallel.schedule=gpipe train.micro_batch_size=16")


RUNS = sorted((REPOSITORY / "configs" / "run").glob("*_*x*_*.yaml"))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_the_runs_in_the_repository_are_what_their_names_say(path):
    """model_hardware_layout: the ranks and every degree over 1 stand in the name, and the config is legal on them."""
    model, hardware, layout = path.stem.split("_")
    config = load_config(path)
    derived = derive(config, int(hardware.partition("x")[0]))
    degrees = {"tp": config.parallel.tp, "pp": config.parallel.pp, "cp": config.parallel.cp, "dp": derived.dp}
    named = {axis: int(size) for axis, size in re.findall(r"([a-z]+)(\d+)", layout)}
    assert named == {axis: size for axis, size in degrees.items() if size > 1 or axis in named}
    assert path.read_text(encoding="utf-8").count(f"base: ../model/{model}.yaml") == 1
    assert "not measured" in path.read_text(encoding="utf-8").partition("base:")[0]
