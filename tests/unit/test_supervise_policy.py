"""What follows the end of an attempt, which nodes are left out, and who is slow: pure decisions."""

import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.supervise.policy import (
    STRAGGLER_RATIO,
    STRAGGLER_STEPS,
    End,
    Requeue,
    Restart,
    Situation,
    StragglerWatch,
    choose_nodes,
    count_fruitless,
    decide,
    find_stragglers,
)
from launcher.supervise.records import (
    NODE_FAULT_DAYS,
    AttemptRecord,
    LaunchState,
    NodeFault,
    Outcome,
    append_attempt,
    append_node_fault,
    excluded_nodes,
    read_attempts,
    read_node_faults,
    read_state,
    write_state,
)
from megascale.errors import EXIT_CRASH_LOOP, EXIT_OK, EXIT_RUN, EXIT_STOPPED, EXIT_USER
from megascale.parallel.heartbeat import COMPUTE_WINDOW, Beat, Phase

NODES = ("a", "b", "c")
FAULTY = (Outcome.FAILED, Outcome.HUNG, Outcome.NODE_LOST)


def attempt(outcome: Outcome, began: int = 3, ended: int = 6) -> AttemptRecord:
    return AttemptRecord("launch", "life", 0, 0.0, 1.0, ("a", "b"), began, ended, ended + 1, outcome, reason="why")


def situation(*attempts: AttemptRecord, **changes) -> Situation:
    return replace(Situation(
        attempts=attempts, usable=NODES, excluded={}, needed=2, max_attempts=3, can_requeue=False, is_chained=False,
        asked="",
    ), **changes)


@pytest.mark.parametrize("outcome", FAULTY)
def test_a_fault_leads_to_another_attempt_on_the_first_nodes_that_may_train(outcome):
    assert decide(situation(attempt(outcome))) == Restart(("a", "b"))
    assert decide(situation(attempt(outcome), usable=("b", "c"), excluded={"a": "lemon"})) == Restart(("b", "c"))


@pytest.mark.parametrize(("outcome", "code"), [(Outcome.DONE, EXIT_OK), (Outcome.REFUSED, EXIT_USER)])
@pytest.mark.parametrize("asked", ["", "time limit", "interrupt"])
@pytest.mark.parametrize("can_requeue", [False, True])
def test_a_complete_or_refused_run_ends_whatever_else_is_so(outcome, code, asked, can_requeue):
    """Mutation that must fail it: looking at the request to stop before the outcome."""
    action = decide(situation(attempt(outcome), asked=asked, can_requeue=can_requeue, usable=()))
    assert isinstance(action, End)
    assert action.code == code


@pytest.mark.parametrize(("asked", "can_requeue", "is_chained", "expected"), [
    ("time limit", True, False, Requeue), ("terminated", True, False, Requeue),
    ("interrupt", True, False, EXIT_STOPPED),
    ("", True, False, EXIT_STOPPED), ("time limit", False, True, EXIT_OK), ("interrupt", False, True, EXIT_STOPPED),
    ("time limit", False, False, EXIT_STOPPED), ("", False, False, EXIT_STOPPED),
])
@pytest.mark.parametrize("outcome", [Outcome.STOPPED, Outcome.FAILED])
def test_a_stop_goes_on_only_where_time_ran_out(asked, can_requeue, is_chained, expected, outcome):
    """Also when a rank failed while it stopped: a fault doesn't undo a person's Ctrl-C."""
    if outcome == Outcome.FAILED and not asked:
        return
    action = decide(situation(attempt(outcome), asked=asked, can_requeue=can_requeue, is_chained=is_chained))
    if expected is Requeue:
        assert isinstance(action, Requeue)
        assert not action.without
    else:
        assert isinstance(action, End)
        assert action.code == (EXIT_RUN if (outcome, expected) == (Outcome.FAILED, EXIT_STOPPED) else expected)


def test_a_stop_that_was_ours_goes_on():
    assert decide(situation(attempt(Outcome.STOPPED), is_replacing=True)) == Restart(("a", "b"))


@pytest.mark.parametrize("can_requeue", [False, True])
def test_a_crash_loop_ends_and_never_goes_back_to_the_queue(can_requeue):
    """Mutation that must fail it: choosing nodes before counting fruitless attempts."""
    fruitless = attempt(Outcome.FAILED, 6, 6)
    assert isinstance(decide(situation(fruitless, fruitless, can_requeue=can_requeue)), Restart)
    action = decide(situation(*[fruitless] * 3, can_requeue=can_requeue, usable=()))
    assert isinstance(action, End)
    assert action.code == EXIT_CRASH_LOOP
    assert "3 attempts in a row" in action.why


@given(st.lists(st.sampled_from(list(Outcome)), max_size=8), st.integers(0, 4))
def test_progress_and_ends_without_a_fault_break_the_row(outcomes, count):
    fruitless = [attempt(Outcome.FAILED, 6, 6)] * count
    earlier = [attempt(outcome) for outcome in outcomes]  # each with a newer checkpoint
    assert count_fruitless([*earlier, *fruitless]) == count
    assert count_fruitless([*earlier, *fruitless, attempt(Outcome.HUNG, 6, 9)]) == 0
    assert count_fruitless([*earlier, *fruitless, attempt(Outcome.STOPPED, 6, 6)]) == 0


def test_too_few_nodes():
    lacking = situation(usable=("a",), excluded={"b": "no GPU"})
    assert choose_nodes(replace(lacking, can_requeue=True)) == Requeue("1 of 2 nodes can train", {"b": "no GPU"})
    chained, alone = choose_nodes(replace(lacking, is_chained=True)), choose_nodes(lacking)
    assert isinstance(chained, End)
    assert chained.code == EXIT_OK
    assert alone == End(EXIT_RUN, "1 of 2 nodes can train: b: no GPU")


@given(st.permutations(NODES), st.integers(1, 3))
def test_nodes_keep_their_order(usable, needed):
    assert choose_nodes(situation(usable=usable, needed=needed)) == Restart(tuple(usable[:needed]))


def beat(compute_s: float, steps_taken: int = COMPUTE_WINDOW + 1) -> Beat:
    return Beat(Phase.COMPUTE, 1, steps_taken, 0.0, steps_taken, 0.1, compute_s, 0, -1)


@given(st.integers(2, 9), st.integers(0, 8), st.floats(1.1, 20), st.floats(1e-3, 10))
def test_a_slow_rank_is_found_and_no_other(num_ranks, slow, ratio, compute_s):
    """Mutation that must fail it: the usual median, which the slower of two ranks exceeds by half as much."""
    slow %= num_ranks
    beats = {rank: beat(compute_s * (ratio if rank == slow else 1.0)) for rank in range(num_ranks)}
    assert find_stragglers(beats) == {slow: pytest.approx(ratio)}


def test_ten_thousand_ranks_are_judged_at_once():
    """Mutation that must fail it: a median of the others for each rank (11 s)."""
    beats = {rank: beat(1.0 + rank % 7 / 1000) for rank in range(10_240)} | {77: beat(2.0)}
    began_s = time.process_time()
    assert list(find_stragglers(beats)) == [77]
    assert time.process_time() - began_s < 2


@given(st.lists(st.floats(1.0, STRAGGLER_RATIO - 0.001), max_size=16))
def test_noise_names_nobody(ratios):
    assert find_stragglers({rank: beat(ratio) for rank, ratio in enumerate(ratios)}) == {}


def test_a_rank_without_a_figure_silences_the_judgement():
    assert find_stragglers({0: beat(1.0), 1: beat(0.0), 2: beat(9.0)}) == {}


def test_a_rank_is_named_only_when_it_stays_slow():
    """Mutation that must fail it: naming a rank at the first look at which it is slow."""
    watch, begin = StragglerWatch(), COMPUTE_WINDOW
    looks = [watch.note({0: beat(1.0, begin + step), 1: beat(2.0, begin + step)}) for step in range(8)]
    assert looks == [{}] * STRAGGLER_STEPS + [{1: 2.0}] * (8 - STRAGGLER_STEPS)
    assert watch.note({0: beat(1.0, begin + 8), 1: beat(1.0, begin + 8)}) == {}
    assert watch.note({0: beat(1.0, begin + 9), 1: beat(2.0, begin + 9)}) == {}


def test_the_first_steps_name_nobody():
    """Mutation that must fail it: judging a rank by whatever steps it has taken."""
    watch = StragglerWatch()
    early = range(COMPUTE_WINDOW // 2)
    assert not any(watch.note({0: beat(1.0, step), 1: beat(9.0, step)}) for step in early)


def fault(node: str, kind: str = "run", unix_s: float = 0.0) -> NodeFault:
    return NodeFault(node, unix_s, kind, f"{kind} of {node}", "life")


@given(st.lists(st.builds(fault, st.sampled_from(NODES), st.sampled_from(["run", "preflight"]))), st.integers(1, 4))
def test_a_node_is_left_out_at_its_last_chance(faults, max_faults):
    """Mutation that must fail it: `> max_faults`."""
    expected = {
        node for node in NODES
        if any(f.node == node and f.kind == "preflight" for f in faults)
        or sum(f.node == node for f in faults) >= max_faults
    }
    assert set(excluded_nodes(faults, max_faults)) == expected


def test_records_are_read_back_and_old_faults_forgotten(tmp_path):
    """Mutation that must fail it: reading all faults, whatever their age."""
    records = [attempt(Outcome.FAILED), attempt(Outcome.DONE)]
    for record in records:
        append_attempt(tmp_path, record)
    assert read_attempts(tmp_path) == records
    now_s = NODE_FAULT_DAYS * 86400 + 100.0
    faults = [fault("a", unix_s=99.0), fault("b", unix_s=101.0)]
    for one in faults:
        append_node_fault(tmp_path, one)
    assert read_node_faults(tmp_path, now_s) == faults[1:]
    state = LaunchState("life", "running", 1.0, "host", 7, nodes=NODES, excluded={"a": "why"}, stragglers=("slow",))
    assert read_state(tmp_path) is None
    write_state(tmp_path, state)
    assert read_state(tmp_path) == state


def test_a_torn_line_and_a_torn_state_are_passed_over(tmp_path):
    append_attempt(tmp_path, attempt(Outcome.FAILED))
    with (tmp_path / "launch" / "attempts.jsonl").open("a") as file:
        file.write('{"life": "torn')
    assert read_attempts(tmp_path) == [attempt(Outcome.FAILED)]
    append_attempt(tmp_path, attempt(Outcome.DONE))
    assert read_attempts(tmp_path)[-1].outcome == Outcome.DONE
    (tmp_path / "launch" / "state.json").write_text('{"life": ')
    assert read_state(tmp_path) is None
