"""One saved field at a time is put back to its start when a run resumes: each time something else comes out.

`CASES` names every field of `RunState`, every scalar of optimizer and loss scaler, and every kind of tensor, with what
shows that it is gone; a new field without a case fails. So a field whose saving or loading is forgotten is found by
comparing a resumed run with one that was never stopped, as the control does here. Mutation seen to be caught by the
control: `restore_scalars` leaves out the loss scaler.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from megascale.checkpoint.find import read_stored_index
from megascale.checkpoint.local_store import LocalStore
from megascale.checkpoint.state import RunState
from tests.support.corpus import make_corpus
from tests.support.ranks import run_ranks
from tests.support.tiny_run import write_config

MODULE = "tests.fault.programs.dropped_fields"
NUM_STEPS = 12
POISONED = [6, 7]
"""Steps, from 0, whose loss is NaN and whose update is skipped; three in a row are the limit."""


@dataclass(frozen=True)
class Drop:
    """What is dropped, what shows it, and where the run resumes.

    Attributes:
        shown_by: what comes out otherwise, see `observe` of the program.
        step: resumes there.
        poison: as `POISONED`.
    """

    shown_by: str
    step: int = 8
    poison: tuple[int, ...] = tuple(POISONED)


CASES = {
    "state.step": Drop("loss"),
    "state.rows": Drop("saved rows"),
    "state.tokens": Drop("tokens_seen"),
    "state.skipped_steps": Drop("saved skipped_steps"),
    "state.skipped_in_a_row": Drop("end", poison=(*POISONED, 8)),
    "state.evaluated_step": Drop("evaluations"),
    "state.validation_loss": Drop("saved validation_loss"),
    "state.ledger": Drop("ledger"),
    "state.stream_digest": Drop("saved stream_digest"),
    "state.wandb_run_id": Drop("wandb run"),
    "state.optimizer_scalars": Drop("nothing"),
    "scalar.step": Drop("loss"),
    "scalar.loss_scaler.cur_scale": Drop("loss_scale", step=6),
    "scalar.loss_scaler.cur_iter": Drop("loss_scale", step=6),
    "scalar.loss_scaler.last_overflow_iter": Drop("loss_scale", step=6),
    "scalar.loss_scaler.cur_hysteresis": Drop("nothing"),
    "tensor.master": Drop("loss"),
    "tensor.exp_avg": Drop("loss"),
    "tensor.exp_avg_sq": Drop("loss"),
}
CONTROLS = sorted({(case.step, case.poison) for case in CASES.values()})
SHOWN_OTHERWISE = {
    "state.optimizer_scalars": "the engine has its own, restored before; its values are cases of their own",
    "scalar.loss_scaler.cur_hysteresis": "DeepSpeed's scaler never changes it at delayed_shift = 1",
}
"""Fields whose loss changes nothing, and why."""


@pytest.fixture(scope="module")
def observed(tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    """The run folder of the run that never stopped, and what was seen of each case."""
    folder = tmp_path_factory.mktemp("dropped")
    config = write_config(folder, make_corpus(folder / "corpus", vocab_size=64))
    cases = [
        {"name": f"control {step} {list(poison)}", "step": step, "drop": None, "poison": poison}
        for step, poison in CONTROLS
    ] + [{"name": name, "step": case.step, "drop": name, "poison": case.poison} for name, case in CASES.items()]
    plan = json.dumps({"poison": POISONED, "cases": cases})
    (lines,) = run_ranks(MODULE, 1, [str(config), str(folder), plan], folder, timeout_s=300)
    results = [json.loads(line) for line in lines.splitlines()]
    return folder / "run", {result["name"]: result["observed"] for result in results}


def control_of(observed: dict[str, dict], case: Drop) -> dict:
    return observed[f"control {case.step} {list(case.poison)}"]


def test_every_saved_field_has_a_case(observed):
    index = read_stored_index(LocalStore(observed[0]), NUM_STEPS)
    saved = {f"state.{field.name}" for field in fields(RunState)}
    saved |= {f"scalar.{name}" for name in index.state.optimizer_scalars}
    saved |= {f"tensor.{key.partition('/')[0]}" for key in index.tensors}
    assert saved == CASES.keys()


@pytest.mark.parametrize("step", sorted({case.step for case in CASES.values()}))
def test_nothing_dropped_is_the_run_that_never_stopped(observed, step):
    whole, control = observed[1]["whole"], observed[1][f"control {step} {POISONED}"]
    for name, value in control.items():
        is_of_steps = name == "digests" or name.startswith("saved ")
        expected = whole[name][step - NUM_STEPS :] if is_of_steps else whole[name]
        if name in ("loss", "grad_norm", "loss_scale", "tokens_seen", "ledger"):
            expected = [pair for pair in expected if pair[0] > step]
        assert value == expected, name


def test_a_third_skip_in_a_row_is_counted_from_before_the_resume(observed):
    assert "step 9: not finite" in control_of(observed[1], CASES["state.skipped_in_a_row"])["end"]


@pytest.mark.parametrize("name", [name for name in CASES if name not in SHOWN_OTHERWISE])
def test_a_dropped_field_shows(observed, name):
    case, found = CASES[name], observed[1][name]
    control = control_of(observed[1], case)
    assert found.get(case.shown_by) != control[case.shown_by], found


@pytest.mark.parametrize("name", SHOWN_OTHERWISE)
def test_a_field_said_to_change_nothing_changes_nothing(observed, name):
    assert observed[1][name] == control_of(observed[1], CASES[name])
