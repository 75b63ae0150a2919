"""An attempt as its controller sees it: from what agents say to the record of how it ended."""

import pytest

from launcher.submit.plan import LaunchPlan
from launcher.supervise.attempt import Attempt
from launcher.supervise.fleet import Event
from launcher.supervise.records import Outcome
from megascale.config.cluster import ClusterConfig
from megascale.errors import EXIT_OK, EXIT_PEER_LOST, EXIT_RUN, EXIT_STOPPED, EXIT_USER


class StubFleet:
    """Agents that open the store, and otherwise only hear."""

    def __init__(self, *present: str):
        self.links, self.told = dict.fromkeys(present), []

    def tell(self, nodes, message: dict) -> None:
        """Notes the message for each node that is there."""
        self.told += [(node, message["type"]) for node in nodes if node in self.links]

    def wait(self, is_over, handle, timeout_s: float) -> bool:
        """Answers as the first node does that was asked for a store."""
        for node, what in self.told:
            if what == "open_store":
                handle(Event(node, {"type": "store", "attempt": 0, "host": "127.0.0.1", "port": 1}))
        return is_over()

    def drop(self, node: str) -> None:
        """Notes it."""
        self.told.append((node, "dropped"))


def begin(tmp_path, fleet: StubFleet) -> Attempt:
    plan = LaunchPlan(run_name="a", run_folder=str(tmp_path), config="c.yaml", nodes=2, ranks_per_node=1,
                      cluster=ClusterConfig())
    attempt = Attempt(
        fleet, plan, launch="launch", life="life", number=0, nodes=("a", "b"), folder=tmp_path / "attempt",
    )
    attempt.start()
    return attempt


def end(attempt: Attempt, rank: int, code: int, phase: str = "compute", unix_s: float = 1.0, tail: str = "") -> None:
    node = attempt.nodes[rank]
    attempt.handle(Event(node, {
        "type": "exit", "attempt": 0, "rank": rank, "code": code, "error": None, "tail": tail, "unix_s": unix_s,
        "step": 4, "phase": phase, "log": "log", "oom": None,
    }))
    attempt.handle(Event(node, {"type": "gone", "attempt": 0}))


@pytest.mark.parametrize("absent", ["a", "b"])
def test_a_node_that_is_lost_before_the_start_is_named_and_costs_no_other(tmp_path, absent):
    """Else its ranks would be waited for as long as a start may take, and the other nodes cut off for their silence.

    Mutations that must fail it: starting ranks on the nodes that are there; waiting for the end of ranks that were
    never started.
    """
    fleet = StubFleet(*{"a", "b"} - {absent})
    attempt = begin(tmp_path, fleet)
    assert attempt.find_fault()
    assert attempt.is_over
    record = attempt.conclude()
    assert (record.outcome, record.culprit, attempt.faulty_nodes) == (Outcome.NODE_LOST, absent, [absent])
    assert {what for _, what in fleet.told} <= {"open_store"}


def test_ranks_that_all_fail_between_two_looks_are_a_fault(tmp_path):
    """Mutation that must fail it: asking whether all are gone before asking for a fault, in the controller and here."""
    attempt = begin(tmp_path, StubFleet("a", "b"))
    end(attempt, 0, EXIT_PEER_LOST, unix_s=2.0)
    end(attempt, 1, -11, unix_s=1.0)
    assert attempt.is_over
    assert attempt.find_fault()
    record = attempt.conclude()
    assert (record.outcome, record.culprit) == (Outcome.FAILED, "rank 1 on b")
    assert record.down_s is not None
    assert attempt.faulty_nodes == ["b"]


@pytest.mark.parametrize(("codes", "phase", "outcome"), [
    ((EXIT_OK, EXIT_OK), "close", Outcome.DONE), ((EXIT_STOPPED, EXIT_STOPPED), "close", Outcome.STOPPED),
    ((EXIT_OK, EXIT_OK), "compute", Outcome.FAILED), ((EXIT_RUN, EXIT_RUN), "compute", Outcome.FAILED),
    ((EXIT_USER, EXIT_USER), "load", Outcome.REFUSED), ((EXIT_STOPPED, EXIT_RUN), "compute", Outcome.FAILED),
])
def test_outcomes(tmp_path, codes, phase, outcome):
    """Mutation that must fail it: taking exit code 0 for a good end in whatever phase."""
    attempt = begin(tmp_path, StubFleet("a", "b"))
    for rank, code in enumerate(codes):
        end(attempt, rank, code, phase)
    assert attempt.find_fault() == (outcome not in (Outcome.DONE, Outcome.STOPPED))
    assert attempt.conclude().outcome == outcome


def test_words_of_another_attempt_count_for_nothing(tmp_path):
    """Mutation that must fail it: not looking at the attempt that a message is about."""
    attempt = begin(tmp_path, StubFleet("a", "b"))
    for node in attempt.nodes:
        attempt.handle(Event(node, {"type": "gone", "attempt": 7}))
    attempt.handle(Event("spare", {"type": "lost", "reason": "why", "silent_s": 1.0}))
    assert not attempt.is_over
    assert not attempt.find_fault()
