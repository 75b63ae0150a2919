"""The virtual cluster does what a real SLURM does, so that tests of the launcher on it mean something."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import SlurmCluster, parse_record
from tests.slurm.virtual_node import can_isolate
from tests.support.ranks import REPOSITORY


def lines_of(path: Path) -> list[str]:
    """Lines of a file that may not be there yet."""
    return path.read_text().splitlines() if path.exists() else []


def test_record_of_scontrol_is_parsed():
    line = "JobId=7 JobName=a b Reason=Node lost TRES=cpu=2,mem=200M NodeList= Command=/x y/run.sh --n 2\n"
    assert parse_record(line) == {
        "JobId": "7", "JobName": "a b", "Reason": "Node lost", "TRES": "cpu=2,mem=200M", "NodeList": "",
        "Command": "/x y/run.sh --n 2",
    }


def test_nodes_have_host_name_shm_and_processes_of_their_own(cluster: SlurmCluster, tmp_path: Path):
    """Caught: node_init without the mount of /dev/shm."""
    script = f"touch /dev/shm/of_{os.getpid()}_$(hostname); echo $(hostname) $(ls /dev/shm); getent hosts node1"
    shown = cluster.run("srun", "-N2", "--label", "sh", "-c", script)
    for task, node in enumerate(("node1", "node2")):
        assert f"{task}: {node} of_{os.getpid()}_{node}\n" in shown
        assert f"{task}: {cluster.layout.address('node1')}" in shown
    assert not list(Path("/dev/shm").glob(f"of_{os.getpid()}_*"))
    assert cluster.doctor("node2", "hostname") == "node2\n"
    cluster.submit("sleep 60", "-w", "node2", "-o", "/dev/null")

    def sleeps(node: str) -> bool:
        commands = [Path(f"/proc/{pid}/comm") for pid in cluster.node_pids(node)]
        return "sleep" in [command.read_text().strip() for command in commands if command.exists()]

    cluster.wait_until(lambda: sleeps("node2"), "the job's process is on node2", timeout_s=20)
    assert not sleeps("node1")


def test_requeued_job_keeps_its_id_and_counts_restarts(cluster: SlurmCluster, tmp_path: Path):
    log = tmp_path / "log"
    job = cluster.submit("echo restart=$SLURM_RESTART_COUNT; [ -n \"$SLURM_RESTART_COUNT\" ] || sleep 60",
                         "--requeue", "--open-mode=append", f"--output={log}")
    cluster.wait_for(job, "RUNNING")
    cluster.wait_until(lambda: lines_of(log) == ["restart="], "the job began", timeout_s=20)
    cluster.scontrol("requeue", str(job))
    cluster.wait_for(job, "COMPLETED", restarts=1, timeout_s=40)
    assert "restart=1" in lines_of(log)


def test_scancel_signals_the_batch_shell_and_the_step(cluster: SlurmCluster, tmp_path: Path):
    """And ends an orphan of a step too, whose parent has ended. Caught: slurmd without the wrapper of slurmstepd."""
    files = [tmp_path / name for name in ("batch", "step", "orphan")]
    for file in files[1:]:
        (tmp_path / f"{file.name}.sh").write_text(
            f"trap 'echo TERM >> {file}; exit' TERM; echo began >> {file}; while :; do sleep 0.1; done\n"
        )
    step = f"(bash {tmp_path}/orphan.sh &); exec bash {tmp_path}/step.sh"
    job = cluster.submit(f"trap 'echo TERM >> {files[0]}' TERM; srun bash -c '{step}' & wait; wait",
                         "-o", "/dev/null")
    cluster.wait_until(lambda: lines_of(files[1]) and lines_of(files[2]), "step and orphan run", timeout_s=20)
    cluster.run("scancel", str(job))
    cluster.wait_for(job, "CANCELLED", timeout_s=20)
    cluster.wait_until(lambda: not cluster.squeue("-t", "CG"), "the job is gone", timeout_s=20)
    assert [lines_of(file) for file in files[:2]] == [["TERM"], ["began", "TERM"]]
    cluster.wait_until(lambda: not runs(cluster, str(files[2])), "the orphan is gone", timeout_s=20)


def test_job_of_a_killed_node_is_requeued_on_the_others(cluster: SlurmCluster, tmp_path: Path):
    log = tmp_path / "log"
    job = cluster.submit("srun hostname; [ -n \"$SLURM_RESTART_COUNT\" ] || sleep 120", "-N2", "--requeue",
                         "--open-mode=append", f"--output={log}")
    cluster.wait_until(lambda: len(lines_of(log)) == 2, "the job began", timeout_s=20)
    victim = cluster.job(job)["NodeList"].partition("[")[2][-2]
    cluster.kill_node(f"node{victim}")
    assert not cluster.node_pids(f"node{victim}")
    fields = cluster.wait_for(job, "COMPLETED", restarts=1, timeout_s=60)
    assert f"node{victim}" not in lines_of(log)[2:]
    assert set(lines_of(log)[-2:]) == {"node1", "node2", "node3"} - {f"node{victim}"}, fields
    assert "DOWN" in cluster.node(f"node{victim}")["State"]
    cluster.heal_node(f"node{victim}")
    cluster.wait_until(lambda: cluster.node(f"node{victim}")["State"] == "IDLE", "the node is back", timeout_s=20)


def test_healed_node_answers_those_who_knew_it(cluster: SlurmCluster):
    """Caught: a network card with another address each time, where neighbours look for the old one for seconds."""
    address, port = cluster.layout.address("node2"), cluster.layout.port + 2
    knock = ["timeout", "2", "bash", "-c", f"exec 3<>/dev/tcp/{address}/{port}"]
    cluster.doctor("node1", *knock)
    cluster.heal_node("node2")
    cluster.doctor("node1", *knock)


def test_job_outlives_restarts_of_both_daemons(cluster: SlurmCluster, tmp_path: Path):
    go, log = tmp_path / "go", tmp_path / "log"
    script = f"srun sh -c 'until [ -e {go} ]; do sleep 0.1; done; hostname'"
    job = cluster.submit(script, "-w", "node2", f"--output={log}")
    cluster.wait_until(lambda: "R" in cluster.squeue("-o", "%t"), "the job runs", timeout_s=20)
    cluster.restart_controller()
    cluster.kill_slurmd("node2")
    cluster.restart_slurmd("node2")
    assert cluster.job(job)["JobState"] == "RUNNING"
    go.touch()
    fields = cluster.wait_for(job, "COMPLETED", timeout_s=40)
    assert (fields["Restarts"], lines_of(log)) == ("0", ["node2"])


def test_job_in_high_preempts_one_in_debug(cluster: SlurmCluster, tmp_path: Path):
    """Its batch shell is warned first."""
    seen = tmp_path / "seen"
    cluster.submit(f"trap 'echo USR1 >> {seen}; exit' USR1; echo began >> {seen}; sleep 120 & wait", "-N3",
                   "--exclusive", "--requeue", "--signal=B:USR1@30", "--time=10", "-o", "/dev/null")
    cluster.wait_until(lambda: lines_of(seen) == ["began"], "the job began", timeout_s=20)
    urgent = cluster.submit("hostname", "-N3", "--exclusive", "-p", "high", "-o", "/dev/null")
    cluster.wait_for(urgent, "COMPLETED", timeout_s=40)
    assert lines_of(seen)[:2] == ["began", "USR1"]


def test_paused_node_stands_still(cluster: SlurmCluster, tmp_path: Path):
    ticks = tmp_path / "ticks"
    cluster.submit(f"while :; do echo x >> {ticks}; sleep 0.05; done", "-w", "node3", "-o", "/dev/null")
    cluster.wait_until(lambda: lines_of(ticks), "the job ticks", timeout_s=20)
    cluster.pause_node("node3")
    before = len(lines_of(ticks))
    time.sleep(0.5)
    assert len(lines_of(ticks)) == before
    cluster.resume_node("node3")
    cluster.wait_until(lambda: len(lines_of(ticks)) > before, "the job ticks again", timeout_s=20)


def test_cut_node_is_out_of_reach_until_mended():
    if not can_isolate("net"):
        pytest.skip("networks of their own for nodes need root and iproute2")
    with SlurmCluster(nodes=1, isolation="net") as cluster:
        slurmd = (cluster.layout.address("node1"), cluster.layout.port + 1)

        def answers() -> bool:
            try:
                socket.create_connection(slurmd, timeout=0.5).close()
            except OSError:
                return False
            return True

        assert answers()
        cluster.cut_node("node1")
        cluster.wait_until(lambda: not answers(), "node1 is out of reach", timeout_s=10)
        cluster.mend_node("node1")
        cluster.wait_until(answers, "node1 answers", timeout_s=10)


def test_cluster_of_a_killed_process_is_gone(tmp_path: Path):
    """Also with a job and a paused node. Caught: daemons started without setpriv."""
    program = (
        "import sys, time\nfrom tests.slurm.cluster import SlurmCluster\n"
        "with SlurmCluster(nodes=2) as cluster:\n"
        "    cluster.submit('sleep 300', '-w', 'node1', '-o', '/dev/null')\n"
        "    cluster.wait_until(lambda: 'R' in cluster.squeue('-o', '%t'), 'it runs')\n"
        "    pids = [p for n in cluster.nodes for p in cluster.node_pids(n)]\n"
        "    pids += [node.first_pid for node in cluster.nodes.values()]\n"
        "    cluster.pause_node('node2')\n"
        "    print(cluster.layout.folder, *pids, *[d.pid for d in cluster._daemons.values()], flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True,
                          env=os.environ | {"TMPDIR": "/tmp"}) as process:
        folder, *pids = process.stdout.readline().split()
        assert len(pids) >= 7
        process.kill()
    deadline = time.monotonic() + 10
    while left := [pid for pid in pids if is_alive(int(pid))]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    subprocess.run(["rm", "-r", folder], check=True)


def runs(cluster: SlurmCluster, word: str) -> bool:
    """Whether a process with a word in its command line runs on any node."""
    commands = [Path(f"/proc/{pid}/cmdline") for node in cluster.nodes for pid in cluster.node_pids(node)]
    return any(word in command.read_text() for command in commands if command.exists())


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be collected doesn't."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
