"""Faults of launched runs on virtual nodes: the run recovers by itself, and ends as if nothing had happened.

The whole table is `python -m tests.fault.fault_table`; here is the part of it that no change may break.
"""

import signal
from pathlib import Path

import pytest

from launcher.supervise.records import read_node_faults
from megascale.errors import EXIT_CRASH_LOOP, EXIT_RUN, EXIT_USER
from tests.fault.launched.cases import CASES, MODEL_PARALLEL, find
from tests.fault.launched.score import Case, Score, run_case
from tests.support.corpus import make_corpus
from tests.support.launched_run import LaunchedRun, Shape, clean_run, launched_run, prepare

CRASHING = "tests.fault.launched.crashing_rank"
QUICK = {
    "SIGKILL of rank 3, backward", "SIGSTOP of rank 3", "a node lost, spare taken",
    "controller killed, same command again",
}
DOWN_S = 5.0
"""Longest time from a death to the end of all ranks, and from a hang's detection."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "corpus", vocab_size=64)


@pytest.fixture(scope="module")
def clean(tmp_path_factory, corpus):
    """Run folders of clean runs, each made when it is first asked for."""
    made: dict[str, Path] = {}

    def get(shape: Shape) -> Path:
        key = repr((shape.nodes * shape.ranks_per_node, shape.changes))
        if key not in made:
            made[key] = clean_run(tmp_path_factory.mktemp("clean"), corpus, shape)
        return made[key]

    return get


def check(case: Case, folder: Path, corpus: Path, clean) -> Score:
    score = run_case(case, folder, corpus, clean(case.shape) if case.is_completed else None)
    assert not score.problems, "\n".join([*score.problems, (folder / "faults" / "output").read_text()[-4000:]])
    return score


def test_a_killed_rank_costs_the_steps_since_the_last_save(tmp_path, corpus, clean):
    """Mutation that must fail it: ending the launch at the first fault."""
    score = check(find("SIGKILL of rank 3, backward"), tmp_path, corpus, clean)
    assert score.down_s < DOWN_S
    assert 0 <= score.steps_lost <= 4, "more than an interval, and the steps during which the last save ran"


def test_a_stopped_rank_is_found_named_and_replaced(tmp_path, corpus, clean):
    """Mutation that must fail it: not looking for hangs in `Attempt.find_fault`."""
    score = check(find("SIGSTOP of rank 3"), tmp_path, corpus, clean)
    assert score.detected_s < 10.0 + DOWN_S


def test_a_lost_node_is_replaced_by_the_spare(tmp_path, corpus, clean):
    """Mutation that must fail it: choosing among all nodes of the job, whether their agents live or not."""
    check(find("a node lost, spare taken"), tmp_path, corpus, clean)


def test_without_its_controller_everything_ends_and_the_same_command_goes_on(tmp_path, corpus, clean):
    """Agents and ranks are gone within 10 s (asserted by the case). Mutation that must fail it: an agent that goes on
    when the connection has ended.
    """
    check(find("controller killed, same command again"), tmp_path, corpus, clean)


def crash(tmp_path: Path, corpus: Path, code: int, shape: Shape, message: str = "error: planned") -> tuple[int, list]:
    plan = prepare(tmp_path, corpus, shape)
    with launched_run(tmp_path / "faults", plan, [], program=CRASHING, code=code, message=message) as run:
        return run.wait(), run.attempts()


def test_a_crash_loop_ends_with_its_own_code(tmp_path, corpus):
    """Mutations that must fail it: a limit of five attempts, not three; not looking for a fault once all ranks are
    gone, which ranks that fail within a tenth of a second are at the first look.
    """
    code, attempts = crash(tmp_path, corpus, EXIT_RUN, Shape(nodes=1))
    assert code == EXIT_CRASH_LOOP
    assert [attempt.outcome for attempt in attempts] == ["failed"] * 3
    assert all("planned" in attempt.reason for attempt in attempts)


def test_bad_input_is_refused_and_not_tried_again(tmp_path, corpus):
    """Mutation that must fail it: treating exit code 2 as any other failure."""
    code, attempts = crash(tmp_path, corpus, EXIT_USER, Shape(nodes=1))
    assert code == EXIT_USER
    assert [(attempt.outcome, attempt.culprit) for attempt in attempts] == [("refused", "rank 0 on local0")]


def test_ranks_that_die_by_a_signal_lead_to_another_node_at_the_third_attempt(tmp_path, corpus):
    """Mutation that must fail it: forgetting the faults of nodes between attempts."""
    plan = prepare(tmp_path, corpus, Shape(nodes=1, ranks_per_node=1, spares=1))
    with launched_run(tmp_path / "faults", plan, [], program=CRASHING, code=-signal.SIGSEGV, message="") as run:
        assert run.wait() == EXIT_CRASH_LOOP
        assert [attempt.nodes for attempt in run.attempts()] == [("local0",), ("local0",), ("local1",)]
        assert [fault.node for fault in read_node_faults(run.run_folder)] == ["local0", "local0", "local1"]


def test_a_full_disk_under_its_own_log_does_not_end_the_controller(tmp_path, corpus):
    """Row 55. Mutation that must fail it: letting an error of `print` pass in `say`."""
    plan = prepare(tmp_path, corpus, Shape(nodes=1))
    run = LaunchedRun(tmp_path / "faults", plan, [], program=CRASHING, code=EXIT_RUN, message="error: planned")
    try:
        run.start(Path("/dev/full"))
        assert run.wait() == EXIT_CRASH_LOOP
        assert len(run.attempts()) == 3
    finally:
        run.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", [case.name for case in CASES if case.name not in QUICK])
def test_every_other_fault_of_the_table(tmp_path, corpus, clean, name):
    """The table's other rows. Mutations that they catch stand at the tests of the parts that find a fault."""
    check(find(name), tmp_path, corpus, clean)


def test_every_rank_of_a_layout_is_on_the_node_that_the_table_says():
    for case in CASES:
        for fault in case.faults:
            assert fault["rank"] < case.shape.nodes * case.shape.ranks_per_node, case.name
    assert MODEL_PARALLEL.nodes * MODEL_PARALLEL.ranks_per_node == 8
