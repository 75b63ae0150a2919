"""Two traces compared, and layouts read: pure functions of `megascale parity`."""

import numpy as np
import pytest
import torch

from launcher.parity import check_room, parse_layout, trace_folder
from megascale.config.load import parse_config
from megascale.errors import ConfigError
from megascale.model.context import build_context
from megascale.model.dropout import derive_row_keys
from megascale.train import compare_traces as compare_traces_module
from megascale.train.compare_traces import Adam, compare_traces
from megascale.train.trace import NUM_SKETCHES, ForwardDigests
from megascale.train.trace_files import Digest, Names, StepFacts, TraceFolder
from tests.support.tiny import TINY_LLAMA

ADAM, RATE, SHAPE = Adam(0.9, 0.95, 1e-8), 0.01, (3, 4)
NAMES = Names(layers=["first", "last"], parameters=["first.weight", "last.weight"])


def write_trace(folder, num_steps=1, noise=0.0, seed=0, change=None) -> TraceFolder:
    """A trace of plain AdamW on random gradients, some of them mere rounding; `change` may alter what is written."""
    random, trace = np.random.default_rng(seed), TraceFolder(folder)
    rounding = np.random.default_rng(seed + 1)
    trace.write_names(NAMES)
    state = {name: [random.normal(size=SHAPE), np.zeros(SHAPE), np.zeros(SHAPE)] for name in NAMES.parameters}
    written = {}
    for name in NAMES.parameters:
        written[1, "start", name] = state[name][0].copy()
    for step in range(1, num_steps + 1):
        digest = Digest([1.0] * NUM_SKETCHES, 4.0, 17)
        facts = StepFacts(2.5, 1.0, RATE, step, dict.fromkeys(NAMES.layers, digest))
        for name in NAMES.parameters:
            gradient = random.normal(size=SHAPE)
            gradient[0] = 0.0
            gradient += noise * rounding.normal(size=SHAPE)
            weight, mean, square = state[name]
            mean[...] = ADAM.beta1 * mean + (1 - ADAM.beta1) * gradient
            square[...] = ADAM.beta2 * square + (1 - ADAM.beta2) * gradient**2
            weight += ADAM.change(mean, square, facts)
            kinds = {"gradient": gradient, "exp_avg": mean, "exp_avg_sq": square, "master": weight}
            written |= {(step, kind, name): values.copy() for kind, values in kinds.items()}
        if change is not None:
            facts = change(step, facts, written) or facts
        trace.write_facts(step, facts)
    for (step, kind, name), values in written.items():
        trace.create_tensor(step, kind, name, SHAPE)
        trace.write_box(step, kind, name, (slice(None), slice(None)), values)
    return trace


def over(a: TraceFolder, b: TraceFolder, limit=1e-6, num_steps=1) -> list[tuple]:
    found = compare_traces(a, b, num_steps, ADAM, b_follows=False)
    return [(each.step, each.phase, each.name, each.index) for each in found if not each.relative <= limit]


def test_equal_traces_are_equal_to_the_bit(tmp_path):
    a, b = write_trace(tmp_path / "a", num_steps=2), write_trace(tmp_path / "b", num_steps=2)
    found = list(compare_traces(a, b, 2, ADAM, b_follows=False))
    assert all(each.is_equal and each.relative == 0 for each in found)
    phases = list(dict.fromkeys((each.step, each.phase) for each in found))
    assert phases == [(1, "start")] + [
        (step, phase) for step in (1, 2) for phase in ("forward", "loss", "gradient", "norm", "update")
    ]


def test_updates_of_full_size_from_mere_rounding_are_explained(tmp_path):
    """Adam divides by the gradient's size: a gradient that is rounding gives an update of full size and any sign.

    Seen to catch: masters compared as they are; the weights before the update left out.
    """
    a, b = (write_trace(tmp_path / name, num_steps=2, noise=noise) for name, noise in (("a", 1e-8), ("b", -1e-8)))
    masters = [trace.read_tensor(1, "master", "last.weight") for trace in (a, b)]
    assert np.abs(masters[0] - masters[1]).max() > 0.1 * RATE
    assert over(a, b, num_steps=2) == []


def test_the_first_difference_comes_first(tmp_path, monkeypatch):
    """Seen to catch: gradients in the order of the model; an index within a chunk in place of the tensor's."""

    monkeypatch.setattr(compare_traces_module, "CHUNK_ELEMENTS", 5)

    def spoil(step, facts, written):
        for name in NAMES.parameters:
            written[1, "gradient", name][2, 1] += 1.0
        written[1, "master", "first.weight"][1, 3] += 1e-3

    a, b = write_trace(tmp_path / "a"), write_trace(tmp_path / "b", change=spoil)
    assert over(a, b) == [
        (1, "gradient", "last.weight", (2, 1)),
        (1, "gradient", "first.weight", (2, 1)),
        (1, "update", "first.weight (master)", (1, 3)),
    ]


def test_what_is_not_a_number_or_not_written_differs(tmp_path):
    """Seen to catch: files that begin full of zeros; a NaN that every comparison lets pass."""

    def spoil(step, facts, written):
        written[1, "gradient", "last.weight"][0, 0] = np.nan
        return StepFacts(float("nan"), facts.norm, facts.learning_rate, facts.updates, facts.forward)

    a, b = write_trace(tmp_path / "a"), write_trace(tmp_path / "b", change=spoil)
    b.create_tensor(1, "start", "first.weight", SHAPE)
    assert over(a, b) == [
        (1, "start", "first.weight", (0, 0)), (1, "loss", "", None), (1, "gradient", "last.weight", (0, 0)),
    ]


def digest_of(parts, names=("layer",)) -> Digest:
    """The digest of (rows, columns, hidden) parts, each as a rank of its own would note it, added up."""
    sums = []
    for rows, columns, hidden_BTD in parts:
        digests = ForwardDigests(counts=True)
        keys_B = derive_row_keys(torch.tensor(rows), seed=3, step=0)
        context = build_context(TINY_LLAMA, 8, torch.device("cpu"), row_keys_B=keys_B)
        digests.add("layer", hidden_BTD, context._replace(columns_T=torch.tensor(columns)))
        sums.append(digests.sums["layer"])
    numbers = sum(each[0] for each in sums).tolist()
    return Digest(numbers[:NUM_SKETCHES], numbers[NUM_SKETCHES], int(sum(each[1] for each in sums)))


def test_a_digest_is_the_same_however_rows_and_columns_are_shared_out():
    """Seen to catch: signs by the place on the rank and not in the row; a checksum that ignores the place."""
    hidden_BTD = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(0))
    whole = digest_of([([5, 9], list(range(8)), hidden_BTD)])
    parts = digest_of([
        ([9], [0, 1, 6, 7], hidden_BTD[1:, [0, 1, 6, 7]]), ([9], [2, 3, 4, 5], hidden_BTD[1:, 2:6]),
        ([5], list(range(8)), hidden_BTD[:1]),
    ])
    assert parts.checksum == whole.checksum
    assert np.allclose(parts.sketch, whole.sketch, rtol=1e-12, atol=1e-12)
    swapped = digest_of([([9, 5], list(range(8)), hidden_BTD)])
    assert swapped.checksum != whole.checksum
    assert not np.allclose(swapped.sketch, whole.sketch)


def test_the_sketch_tells_the_size_of_a_difference():
    hidden_BTD = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(0))
    other_BTD = hidden_BTD + 1e-4 * torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(1))
    a, b = (digest_of([([5, 9], list(range(8)), each)]) for each in (hidden_BTD, other_BTD))
    estimate = np.sqrt(np.mean(np.square(np.array(a.sketch) - np.array(b.sketch))))
    assert 0.5 < estimate / float((hidden_BTD - other_BTD).norm()) < 1.6


def test_a_layout_is_read():
    choice = parse_layout("tp2,pp2,dp3,ep3,zero0,schedule=interleaved_1f1b,stage_layers=[1,3],micro_batch_size=1")
    assert choice.ranks == 12
    assert choice.overrides == (
        "parallel.pp=2", "parallel.cp=1", "parallel.tp=2", "parallel.ep=3", "parallel.zero_stage=0",
        "parallel.schedule=interleaved_1f1b", "parallel.stage_layers=[1,3]", "train.micro_batch_size=1",
    )
    assert parse_layout("dp1").overrides == ("parallel.pp=1", "parallel.cp=1", "parallel.tp=1", "parallel.ep=1")


@pytest.mark.parametrize(("text", "said"), [
    ("tp2,tp4", "`tp` stands twice"),
    ("up2", "`up2` is neither an axis with its size (pp, dp, cp, tp, ep)"),
    ("tp", "`tp` is neither an axis"),
    ("tp=2", "write `tp` with its number"),
    ("tp2,zero_stage=1", "write `zero` with its number"),
    ("dp0", "an axis has 1 rank or more"),
    ("dp2,seq_len=8", "`seq_len` isn't a setting that may differ"),
    ("dp2,learning_rate=1", "`learning_rate` isn't a setting that may differ"),
])
def test_a_bad_layout_is_refused_with_the_rule(text, said):
    with pytest.raises(ConfigError) as caught:
        parse_layout(text)
    assert f"--layout {text}: " in str(caught.value)
    assert said in str(caught.value)


def test_traces_go_to_a_new_folder_with_room(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match="isn't empty"), trace_folder(tmp_path / "full"):
        pass
    values = {"run": {"name": "x", "folder": "x"}, "model": TINY_LLAMA.model_dump(), "data": {"folder": "x"},
              "train": {"seq_len": 8, "micro_batch_size": 1, "global_batch_tokens": 8, "max_steps": 10**9},
              "optimizer": {"learning_rate": 1.0}, "evaluate": {"interval_steps": 1},
              "checkpoint": {"interval_steps": 1}}
    config = parse_config(values, source="test")
    check_room(tmp_path, config, 3)
    with pytest.raises(ConfigError, match="GB free"):
        check_room(tmp_path, config, 10**9)
