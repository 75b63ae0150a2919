"""Networks and nodes that fail without dying, on a real SLURM whose nodes have networks of their own.

Each run ends as one that nobody touched: metrics, weights, and every token read once.
"""

import os
import time
from pathlib import Path

import pytest

from launcher.supervise.records import Outcome
from tests.slurm.cluster import SlurmCluster
from tests.slurm.launched_run import LaunchedRun
from tests.slurm.test_launch import outcomes, reference, run  # noqa: F401 - fixtures

pytestmark = pytest.mark.slow
BEFORE = 25
"""Step at which a fault comes: one checkpoint is safe by then."""
SLOW_LINK = ["tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "4mbit", "burst", "32kbit", "latency", "400ms"]


@pytest.fixture(autouse=True)
def own_networks(cluster: SlurmCluster) -> None:
    if cluster.layout.isolation != "net":
        pytest.skip("nodes have networks of their own only for root with iproute2")


def ranks_on(cluster: SlurmCluster, node: str) -> list[int]:
    """Processes of ranks on a node."""
    found = []
    for pid in cluster.node_pids(node):
        command = Path(f"/proc/{pid}/cmdline")
        if command.exists() and b"megascale.train.rank" in command.read_bytes():
            found.append(pid)
    return found


def test_link_that_flaps_for_three_seconds(run: LaunchedRun, reference: Path):  # noqa: F811
    """Row 17: shorter than `limits.node_s`, so TCP's own repeats carry the run over it, or it starts again."""
    job = run.launch("--spares", "1")
    run.wait_for_step(BEFORE)
    run.cluster.cut_node("node2")
    time.sleep(3)
    run.cluster.mend_node("node2")
    run.wait_for(job, "COMPLETED")
    run.assert_ended_as(reference / "run")


def test_node_that_is_cut_off_stops_by_itself(run: LaunchedRun, reference: Path):  # noqa: F811
    """Row 18: the half without the controller ends its ranks within `limits.node_s`; the spare goes on.

    Mutation: an agent that never gives up on its controller.
    """
    job = run.launch("--spares", "1")
    run.wait_for_step(BEFORE)
    assert ranks_on(run.cluster, "node2")
    run.cluster.cut_node("node2")
    run.cluster.wait_until(lambda: not ranks_on(run.cluster, "node2"), "the half that was cut off stops", timeout_s=20)
    run.wait_for(job, "COMPLETED")
    assert outcomes(run) == [Outcome.NODE_LOST, Outcome.DONE]
    assert run.attempts[0].culprit == "node2"
    assert run.attempts[1].nodes == ("node1", "node3")
    run.assert_ended_as(reference / "run")


def test_controller_that_is_cut_off_neither_trains_nor_saves(run: LaunchedRun, reference: Path):  # noqa: F811
    """Row 18, the other way: SLURM requeues the job on the others while the old controller still lives."""
    job = run.launch()
    run.wait_for_step(BEFORE)
    run.cluster.cut_node("node1")
    run.cluster.wait_until(lambda: not ranks_on(run.cluster, "node1") and not ranks_on(run.cluster, "node2"),
                           "both halves stop", timeout_s=30)
    run.wait_for(job, "COMPLETED", restarts=1)
    assert run.attempts[-1].nodes == ("node2", "node3")
    run.assert_ended_as(reference / "run")


def test_node_that_freezes(run: LaunchedRun, reference: Path):  # noqa: F811
    """Row 13: every process of the node is stopped; when it thaws, its ghosts end and have changed nothing."""
    job = run.launch("--spares", "1")
    run.wait_for_step(BEFORE)
    run.cluster.pause_node("node2")
    run.cluster.wait_until(lambda: outcomes(run) == [Outcome.NODE_LOST], "the silence is noticed", timeout_s=30)
    run.cluster.resume_node("node2")
    run.cluster.wait_until(lambda: not ranks_on(run.cluster, "node2"), "the ghosts end", timeout_s=20)
    run.wait_for(job, "COMPLETED")
    assert run.attempts[0].culprit == "node2"
    run.assert_ended_as(reference / "run")


def test_slow_link_is_slow_but_right(run: LaunchedRun, reference: Path):  # noqa: F811
    """Row 19: 4 Mbit/s. The next pre-flight leaves the node out for it."""
    if os.getuid() != 0:
        pytest.skip("only root can slow a link down")
    job = run.launch()
    run.wait_for_step(5)
    run.cluster.doctor("node2", *SLOW_LINK)
    try:
        run.wait_for(job, "COMPLETED")
        run.assert_ended_as(reference / "run")
        again = run.launch("--fresh", "--spares", "1")
        run.wait_for(again, "COMPLETED")
        assert "bandwidth" in run.faulty_nodes["node2"]
        assert run.attempts[-1].nodes == ("node1", "node3")
    finally:
        run.cluster.doctor("node2", "tc", "qdisc", "del", "dev", "eth0", "root")
