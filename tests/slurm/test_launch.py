"""`megascale launch slurm` on a real SLURM: whatever happens to a job, the run ends as one that nobody touched."""

import os
from pathlib import Path

import pytest

from launcher.supervise.records import Outcome
from tests.slurm.cluster import SlurmCluster
from tests.slurm.launched_run import NUM_STEPS, LaunchedRun, write_config
from tests.support.corpus import make_corpus
from tests.support.tiny_run import megascale


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """A corpus, and in `run` an uninterrupted run of 2 ranks on it, without SLURM."""
    folder = tmp_path_factory.mktemp("reference")
    make_corpus(folder / "corpus", vocab_size=64)
    return train_undisturbed(folder, folder / "corpus", 2)


def train_undisturbed(folder: Path, corpus: Path, num_ranks: int) -> Path:
    """Trains `folder/run` on this machine; returns `folder`."""
    done = megascale("train", write_config(folder, corpus), "--nproc", str(num_ranks), timeout_s=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def run(cluster: SlurmCluster, tmp_path: Path, reference: Path) -> LaunchedRun:
    return LaunchedRun(cluster, tmp_path, reference / "corpus")


def outcomes(run: LaunchedRun) -> list[str]:
    """How the attempts ended, in order."""
    return [attempt.outcome for attempt in run.attempts]


def assert_no_step_lost(run: LaunchedRun) -> None:
    """Each attempt but the last saved the last step that it took, and the next went on from there."""
    for attempt, following in zip(run.attempts, run.attempts[1:], strict=False):
        assert attempt.ended_step == attempt.reached_step == following.began_step, run.attempts


def test_two_nodes_train_what_one_machine_trains(cluster: SlurmCluster, tmp_path: Path, reference: Path):
    """2 nodes x 2 ranks over gloo, against 4 ranks of `megascale train`."""
    run = LaunchedRun(cluster, tmp_path, reference / "corpus", ranks_per_node=2)
    job = run.launch()
    fields = run.wait_for(job, "COMPLETED")
    assert (fields["Restarts"], fields["ExitCode"]) == ("0", "0:0")
    (tmp_path / "undisturbed").mkdir()
    run.assert_ended_as(train_undisturbed(tmp_path / "undisturbed", reference / "corpus", 4) / "run")
    (attempt,) = run.attempts
    assert (attempt.outcome, attempt.nodes, attempt.ended_step) == (Outcome.DONE, ("node1", "node2"), NUM_STEPS)


def test_warning_of_the_time_limit_saves_and_requeues(run: LaunchedRun, reference: Path):
    job = run.launch("--time", "10")
    run.wait_for_step(5)
    run.cluster.run("scancel", "--batch", "--signal=USR1", job)
    run.wait_for(job, "COMPLETED", restarts=1)
    assert outcomes(run) == [Outcome.STOPPED, Outcome.DONE]
    assert_no_step_lost(run)
    run.assert_ended_as(reference / "run")


@pytest.mark.slow
def test_time_limit_itself_saves_and_requeues(run: LaunchedRun, reference: Path):
    """SLURM looks at time limits every 30 s only, hence a minute for each life of the job."""
    run.config.write_text(run.config.read_text().replace("max_steps: 60", "max_steps: 600"))
    job = run.launch("--time", "1")
    run.wait_for(job, "PENDING", "RUNNING", restarts=2)
    run.cluster.run("scancel", job)
    run.wait_for(job, "CANCELLED")
    assert set(outcomes(run)) == {Outcome.STOPPED}
    assert_no_step_lost(run)


@pytest.mark.slow
def test_chain_goes_on_in_its_next_link(run: LaunchedRun, reference: Path):
    """`--array-restarts 3`: the second link finishes the run, the third finds nothing to do."""
    job = run.launch("--array-restarts", "3")
    run.wait_for_step(5)
    run.cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_1", check=False)  # exit code 229, but sent
    for link in (1, 2, 3):
        run.wait_for(f"{job}_{link}", "COMPLETED")
    assert outcomes(run) == [Outcome.STOPPED, Outcome.DONE]
    assert [attempt.life for attempt in run.attempts] == [f"{job}_1.0", f"{job}_2.0"]
    assert_no_step_lost(run)
    run.assert_ended_as(reference / "run")


def test_scancel_saves_and_the_next_launch_goes_on(run: LaunchedRun, reference: Path):
    """Mutation seen to be caught: every SIGTERM puts the job back into the queue, also that of scancel."""
    job = run.launch()
    run.wait_for_step(5)
    run.cluster.run("scancel", job)
    fields = run.wait_for(job, "CANCELLED")
    run.cluster.wait_until(lambda: not run.cluster.squeue("-j", job), "the job is gone", timeout_s=40)
    assert fields["Restarts"] == "0"
    run.wait_for(run.launch(), "COMPLETED")
    assert run.cluster.job(job)["JobState"] == "CANCELLED"
    assert outcomes(run) == [Outcome.STOPPED, Outcome.DONE]
    assert_no_step_lost(run)
    run.assert_ended_as(reference / "run")


@pytest.mark.slow
def test_preempted_run_saves_and_goes_on(run: LaunchedRun, reference: Path):
    """A job of a higher partition takes the nodes; SLURM warns as before a time limit."""
    job = run.launch()
    run.wait_for_step(5)
    other = run.cluster.submit("sleep 5", "--partition=high", "--nodes=3", "--ntasks-per-node=1", "--cpus-per-task=4")
    run.wait_for(job, "COMPLETED", restarts=1)
    assert run.cluster.job(other)["JobState"] == "COMPLETED"
    assert outcomes(run) == [Outcome.STOPPED, Outcome.DONE]
    assert_no_step_lost(run)
    run.assert_ended_as(reference / "run")


def test_requeue_by_hand_saves_and_goes_on(run: LaunchedRun, reference: Path):
    job = run.launch()
    run.wait_for_step(5)
    run.cluster.scontrol("requeue", job)
    run.wait_for(job, "COMPLETED", restarts=1)
    assert outcomes(run) == [Outcome.STOPPED, Outcome.DONE]
    assert_no_step_lost(run)
    run.assert_ended_as(reference / "run")


def test_spare_takes_the_place_of_a_killed_node(run: LaunchedRun, reference: Path):
    job = run.launch("--spares", "1")
    run.wait_for_step(25)
    run.cluster.kill_node("node2")
    fields = run.wait_for(job, "COMPLETED")
    assert fields["Restarts"] == "0"
    assert outcomes(run) == [Outcome.NODE_LOST, Outcome.DONE]
    assert run.attempts[0].culprit.endswith("node2")
    assert run.attempts[1].nodes == ("node1", "node3")
    assert run.attempts[1].began_step >= 20
    run.assert_ended_as(reference / "run")


@pytest.mark.parametrize("victim", ["node1", "node2"])
def test_job_of_a_killed_node_goes_on_on_others(run: LaunchedRun, reference: Path, victim: str):
    """Without a spare; node1 is the one of the controller, of which nothing is left."""
    job = run.launch()
    run.wait_for_step(25)
    run.cluster.kill_node(victim)
    run.wait_for(job, "COMPLETED", restarts=1)
    last = run.attempts[-1]
    assert (last.outcome, last.nodes) == (Outcome.DONE, tuple(n for n in ("node1", "node2", "node3") if n != victim))
    assert last.began_step >= 20
    run.assert_ended_as(reference / "run")


@pytest.mark.parametrize("spares", [1, 0])
def test_node_with_a_full_shared_memory_is_left_out(run: LaunchedRun, reference: Path, spares: int):
    """By the pre-flight, before a rank started: for a spare, or for another node after a requeue."""
    if os.getuid() != 0:
        pytest.skip("only root can mount /dev/shm again with another size")
    run.cluster.doctor("node2", "mount", "-o", "remount,size=64k", "/dev/shm")
    job = run.launch("--spares", str(spares))
    fields = run.wait_for(job, "COMPLETED", restarts=1 - spares)
    assert int(fields["Restarts"]) == 1 - spares
    assert set(run.faulty_nodes) == {"node2"}
    assert "/dev/shm" in run.faulty_nodes["node2"]
    (attempt,) = run.attempts
    assert (attempt.outcome, attempt.nodes) == (Outcome.DONE, ("node1", "node3"))
    run.assert_ended_as(reference / "run")


def test_run_outlives_a_restart_of_slurmctld(run: LaunchedRun, reference: Path):
    job = run.launch()
    run.wait_for_step(5)
    run.cluster.restart_controller()
    fields = run.wait_for(job, "COMPLETED")
    assert fields["Restarts"] == "0"
    assert outcomes(run) == [Outcome.DONE]
    run.assert_ended_as(reference / "run")
