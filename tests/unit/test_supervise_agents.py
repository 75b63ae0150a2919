"""Agents are started, and started again where one node took the others' start with it."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.supervise.controller import Controller
from launcher.supervise.transports import SlurmTransport

SRUN = """#!/bin/bash
echo "srun: error: Task launch for StepId=20.0 failed on node node2: Communication connection failure"
echo "srun: error: Application launch failed: Communication connection failure"
exit {code}
"""


class StubFleet:
    """Agents connect as soon as they are started, unless their start failed."""

    def __init__(self):
        self.links: dict[str, object] = {}

    def wait(self, is_over, handle, timeout_s: float) -> bool:
        return bool(is_over())


class StubTransport:
    """A start of several nodes fails where a sick one is among them, and so does a start of a sick one."""

    def __init__(self, fleet: StubFleet, sick: Sequence[str], names: bool = True):
        self.fleet, self.sick, self.names, self.started, self._failed = fleet, set(sick), names, [], None

    def start(self, nodes, *_) -> None:
        self.started.append(list(nodes))
        found = tuple(node for node in nodes if node in self.sick)
        self._failed = (found if self.names else ()) if found else None
        if not found:
            self.fleet.links.update(dict.fromkeys(nodes))

    def failed_start(self) -> tuple[str, ...] | None:
        return self._failed


def start(sick: Sequence[str], recovers: bool = False, names: bool = True) -> tuple[StubTransport, dict[str, str]]:
    controller, blamed = Controller.__new__(Controller), {}
    controller._fleet = StubFleet()
    controller._transport = StubTransport(controller._fleet, sick, names)
    controller._bad, controller._asked, controller._logs = {}, SimpleNamespace(count=0), Path("logs")
    controller._address = controller._token_file = controller._handle = None
    controller._note_fault = lambda node, kind, reason: blamed.update({node: reason})

    def say(_: str) -> None:
        if recovers:
            controller._transport.sick.clear()

    controller._say = say
    controller._start_agents(("node1", "node2", "node3"), 60.0)
    return controller._transport, blamed


def test_all_are_started_at_once():
    transport, blamed = start([])
    assert (transport.started, blamed) == ([["node1", "node2", "node3"]], {})


def test_a_node_that_cannot_be_reached_is_blamed_alone():
    """Caught: no second start, by which all three were blamed; a second one of all together."""
    transport, blamed = start(["node2"])
    assert transport.started[1:] == [["node1", "node3"], ["node2"]]
    assert list(blamed) == ["node2"]
    assert "didn't connect within 60 s" in blamed["node2"]


@pytest.mark.parametrize("names", [True, False])
def test_a_node_that_can_be_reached_again_is_taken(names: bool):
    transport, blamed = start(["node2"], recovers=True, names=names)
    assert sorted(transport.fleet.links) == ["node1", "node2", "node3"]
    assert not blamed


@pytest.mark.parametrize(("code", "failed"), [(1, ("node2",)), (0, None)])
def test_srun_names_the_node_that_it_failed_at(tmp_path, monkeypatch, code: int, failed):
    """Of the last srun only: the log may tell of another's failure before."""
    (tmp_path / "srun").write_text(SRUN.format(code=code))
    (tmp_path / "srun").chmod(0o755)
    (tmp_path / "srun.log").write_text("srun: error: Task launch for StepId=20.0 failed on node node9: Timed out\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    cluster = SimpleNamespace(cpus_per_node=1, container=None, python=None, limits=SimpleNamespace(node_s=30))
    transport = SlurmTransport.__new__(SlurmTransport)
    transport._plan, transport._cores, transport._steps = SimpleNamespace(cluster=cluster), 1, []
    assert transport.failed_start() is None
    transport.start(["node1", "node2"], "127.0.0.1:1", tmp_path / "token", tmp_path)
    transport._steps[-1].wait(10)
    assert transport.failed_start() == failed
