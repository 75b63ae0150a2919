"""The leak test over layouts: no document sees another in any, and faults planted in one of them are found.

The planted faults are mutations of the model. Mutations of the leak test itself that were seen to be caught, each by
the fault in brackets: gradients not looked at (ring's backward), logits of tp rank 0 alone (head of tp rank 1), no word
on the control (reads nothing), none on the same rows computed twice (noise).
"""

import json

import pytest

from tests.support.ranks import run_ranks
from tests.support.tiny_run import write_config

MASKED = ["data.document_mask=true", "train.global_batch_tokens=128"]
TP, RING, ULYSSES, PP, ZERO3 = (
    ["parallel.tp=2"], ["parallel.cp=2"], ["parallel.cp=2", "parallel.context_attention=ulysses", "model.dropout=0.0"],
    ["parallel.pp=2", "train.recompute=full"], ["parallel.zero_stage=3", "precision.dtype=bf16"],
)
FAULTS = {
    "noise": ([], "isn't deterministic to the bit"),
    "mask without documents": (RING, "first in the output of blocks.0"),
    "mask without documents on tp rank 1": (TP, "first in the output of blocks.0"),
    "head of tp rank 1 mixes positions": (TP, "first in the output of head"),
    "second stage without documents": (PP, "first in the output of blocks.1"),
    "ring's backward without mask": (RING, "the fault is in a backward pass"),
    "perturbs nothing": ([], "the leak test is blind under attention with a dense mask, fp32, dp2, zero1"),
    "attention that reads nothing": ([], "with nothing to keep documents apart they still don't see each other"),
}
CLEAN = (TP, RING, ULYSSES, PP, ZERO3)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What was found in each layout without fault, then with each fault: one start of the ranks for all."""
    folder = tmp_path_factory.mktemp("leaks")
    cases = [*((layout, None) for layout in CLEAN), *((layout, fault) for fault, (layout, _) in FAULTS.items())]
    requests = [([*MASKED, *layout], fault) for layout, fault in cases]
    config = write_config(folder, folder / "nowhere")
    printed, _ = run_ranks("tests.dist.programs.leaks", 2, [str(config), json.dumps(requests)], folder)
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("number", range(len(CLEAN)))
def test_no_document_sees_another(results, number):
    assert results[number]["said"] is None
    same, *changed, control = results[number]["counts"]
    assert len(changed) == 4
    for others, itself, others_changed, itself_changed, inputs, own_inputs, reached, own_reached in changed:
        assert others + itself == inputs + own_inputs == same[0]
        assert (others_changed, itself_changed, reached, own_reached) == (0, itself, 0, own_inputs)
    assert control[2] == control[0]


@pytest.mark.parametrize("number", range(len(FAULTS)), ids=list(FAULTS))
def test_a_planted_fault_is_found(results, number):
    (_, said), found = list(FAULTS.values())[number], results[len(CLEAN) + number]
    assert said in found["said"]
    if "first in the output" in said:
        assert any(others_changed for _, _, others_changed, *_ in found["counts"][1:-1])
