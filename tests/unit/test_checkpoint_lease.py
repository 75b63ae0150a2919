"""Two jobs on one run folder: the second is refused while the first lives, and takes over when it is dead."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from megascale.checkpoint.lease import LEASE_NAME, RunLease, check_claim
from megascale.errors import CheckpointError

HOLDER = """
import sys, time
from pathlib import Path
from megascale.checkpoint.lease import RunLease
lease = RunLease.take(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def pretend_other_machine(run_folder):
    path = run_folder / LEASE_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "boot_id": "elsewhere", "host": "node7"}))


def test_the_second_job_is_refused_with_the_first_one_named(tmp_path, holder):
    with pytest.raises(CheckpointError, match=rf"is in use by process {holder.pid} on .+, since .+ run\.folder"):
        RunLease.take(tmp_path)


def test_death_gives_the_folder_back_at_once(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with RunLease.take(tmp_path, stale_s=30.0) as lease:
        check_claim(lease.claim)
        assert json.loads((tmp_path / LEASE_NAME).read_text())["pid"] == os.getpid()


def test_release_gives_the_folder_back(tmp_path):
    for _ in range(2):
        lease = RunLease.take(tmp_path)
        lease.release()
        lease.release()
    assert (tmp_path / LEASE_NAME).read_text() == ""


def test_a_silent_holder_on_another_machine_is_taken_over_after_a_while(tmp_path):
    with RunLease.take(tmp_path):
        text = (tmp_path / LEASE_NAME).read_text()
    (tmp_path / LEASE_NAME).write_text(text)
    pretend_other_machine(tmp_path)
    start = time.monotonic()
    with RunLease.take(tmp_path, stale_s=0.4):
        assert time.monotonic() - start >= 0.4


@pytest.mark.parametrize(("life", "waits"), [("job.1", False), ("job.2", True), ("", True)])
def test_a_holder_of_the_same_life_on_another_machine_is_known_to_be_dead(tmp_path, life, waits):
    """Mutations seen to be caught: any life counts as the same; none counts as the same as none."""
    with RunLease.take(tmp_path, life="job.1" if life else ""):
        text = (tmp_path / LEASE_NAME).read_text()
    (tmp_path / LEASE_NAME).write_text(text)
    pretend_other_machine(tmp_path)
    start = time.monotonic()
    with RunLease.take(tmp_path, life=life, stale_s=0.5):
        assert (time.monotonic() - start >= 0.5) == waits


def test_a_held_lease_of_the_same_life_is_refused(tmp_path):
    """A frozen rank 0, soon to be killed, holds its lock still. Mutation seen to be caught: it is passed over."""
    with RunLease.take(tmp_path, life="job.1"), pytest.raises(CheckpointError, match="is in use by process"):
        RunLease.take(tmp_path, life="job.1", stale_s=0.2)


def test_a_lease_of_before_there_were_lives_counts(tmp_path):
    """Mutation seen to be caught: its holder, of whom nothing is known to be wrong, counts as nobody."""
    path = tmp_path / LEASE_NAME
    with RunLease.take(tmp_path):
        owner = json.loads(path.read_text())
    del owner["life"]
    path.write_text(json.dumps(owner | {"boot_id": "elsewhere", "host": "node7"}))
    beat = threading.Timer(0.1, os.utime, [path])
    beat.start()
    with pytest.raises(CheckpointError, match="on node7"):
        RunLease.take(tmp_path, life="job.1", stale_s=5.0)
    beat.join()


def test_a_beating_holder_on_another_machine_is_not(tmp_path):
    path = tmp_path / LEASE_NAME
    with RunLease.take(tmp_path):
        text = path.read_text()
    path.write_text(text)
    pretend_other_machine(tmp_path)
    beat = threading.Timer(0.2, os.utime, [path])
    beat.start()
    with pytest.raises(CheckpointError, match="on node7"):
        RunLease.take(tmp_path, stale_s=5.0)
    beat.join()


def test_a_holder_that_was_replaced_notices_and_stops_beating(tmp_path):
    """A job that was frozen while another took its folder must not commit; `check_claim` says so."""
    path = tmp_path / LEASE_NAME
    lease = RunLease.take(tmp_path, heartbeat_s=0.05)
    before = path.stat().st_mtime_ns
    time.sleep(0.2)
    assert path.stat().st_mtime_ns > before
    pretend_other_machine(tmp_path)
    time.sleep(0.2)
    stopped = path.stat().st_mtime_ns
    time.sleep(0.2)
    assert path.stat().st_mtime_ns == stopped
    with pytest.raises(CheckpointError, match="on node7"):
        check_claim(lease.claim)
    lease.release()
    assert "node7" in path.read_text()


def test_without_locks_the_heartbeat_alone_decides(tmp_path, monkeypatch):
    """A file system that has no flock: a beating holder is refused even on this machine, a silent one taken over."""
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with RunLease.take(tmp_path, heartbeat_s=0.05), pytest.raises(CheckpointError, match="is in use by process"):
        RunLease.take(tmp_path, stale_s=5.0)
    lease = RunLease.take(tmp_path, heartbeat_s=60.0)
    RunLease.take(tmp_path, stale_s=0.2).release()
    with pytest.raises(CheckpointError, match="is in use by another process"):
        check_claim(lease.claim)
    lease.release()


def test_a_damaged_lease_without_a_lock_is_nobodys(tmp_path):
    (tmp_path / LEASE_NAME).write_text('{"host": ')
    RunLease.take(tmp_path).release()


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"missing/lease\.json: can't take the run folder: No such file"):
        RunLease.take(tmp_path / "missing")
