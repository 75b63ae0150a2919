"""`megascale status`, `logs` and `stop` on run folders made by hand."""

import getpass
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launcher import logs, status, stop
from launcher.status import QueueEntry, Standing, describe, judge, read_status
from launcher.supervise.records import (
    AttemptRecord,
    LaunchState,
    NodeFault,
    append_attempt,
    append_node_fault,
    write_state,
)
from megascale.checkpoint.run_file import note_saved
from megascale.errors import CheckpointError, LaunchError, RankFailedError

STATE = LaunchState("9.0", "running", 0.0, "host", 1, job_id="9", attempt=1, nodes=("a", "b"), step=41, phase="compute",
                    stragglers=("rank 3 on b: 1.4 x",))


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "run"
    (folder / "launch").mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    (folder / "config.yaml").write_text("train: {max_steps: 100}\n")
    line = {"kind": "train", "step": 40, "loss": 3.25, "tokens_per_s": 12345.6, "eta_s": 130.0}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + '\n{"kind": "eval", "step": 40}\n{"kind": "tr')
    return folder


def told(run: Path, **values) -> LaunchState:
    state = replace(STATE, **{"unix_s": time.time(), "job_id": "", **values})
    write_state(run, state)
    return state


@pytest.mark.parametrize(("values", "facts", "standing"), [
    ({}, {}, Standing.RUNNING),
    ({}, {"age_s": 31}, Standing.SILENT),
    ({}, {"age_s": 31, "is_held": True}, Standing.RUNNING),
    ({}, {"queue": QueueEntry("PENDING", "Resources", "N/A")}, Standing.WAITING),
    ({"status": "requeued"}, {"queue": QueueEntry("PENDING", "BeginTime", "N/A"), "age_s": 99}, Standing.WAITING),
    ({"status": "ended", "exit_code": 0}, {"is_complete": True}, Standing.FINISHED),
    ({"status": "ended", "exit_code": 0}, {}, Standing.STOPPED),
    ({"status": "ended", "exit_code": 75}, {}, Standing.STOPPED),
    ({"status": "ended", "exit_code": 93}, {}, Standing.FAILED),
    ({"status": "ended", "exit_code": 3}, {"is_complete": True}, Standing.FAILED),
    ({"status": "ended", "exit_code": 75}, {"is_held": True}, Standing.RUNNING),
    (None, {"is_held": True}, Standing.RUNNING),
    (None, {"is_complete": True}, Standing.FINISHED),
    (None, {}, Standing.STOPPED),
])
def test_standing(values, facts, standing):
    """Mutations seen caught: the lease not asked of an old state; a queue that is passed over for a fresh state."""
    state = None if values is None else replace(STATE, **values)
    given = {"age_s": 1.0, "is_held": False, "queue": None, "is_complete": False, "job_id": "9", **facts}
    assert judge(state, **given)[0] == standing


def test_status_of_a_launched_run(run):
    told(run)
    note_saved(run, 30)
    record = AttemptRecord("one", "9.0", 0, 0.0, 50.0, ("a", "b"), -1, 30, 38, "hung", "rank 3 on b",
                           "step: silent", 12.3, 2.5)
    append_attempt(run, record)
    append_attempt(run, replace(record, attempt=1, began_s=59.0, outcome="stopped", detected_s=None, down_s=None))
    append_node_fault(run, NodeFault("c", time.time(), "preflight", "/dev/shm is full", "9.0"))
    (run / "goodput.json").write_text('{"goodput_fraction": 0.931}')
    text = describe(read_status(run))
    assert text.splitlines()[0] == f"{run}: running (running); step 41 of 100 (41.0 %)"
    for words in ("nodes: a, b; attempt 9.0/1, phase compute", "loss 3.2500, 12,346 tokens/s, about 2 min 10 s left",
                  "newest checkpoint: step 30", "goodput: 93.1 %", "straggler: rank 3 on b",
                  "attempt 9.0/0: hung; steps 0 to 38, at fault: rank 3 on b, detected after 12.3 s, all ranks down"
                  " 2.5 s later, next attempt 9 s later: step: silent", "left out: c: /dev/shm is full"):
        assert words in text


def test_status_as_json_and_of_strange_folders(run, tmp_path, capsys):
    told(run)
    status.print_status(run, as_json=True)
    values = json.loads(capsys.readouterr().out)
    assert values["standing"] == "running"
    assert values["state"]["step"] == 41
    (run / "launch" / "state.json").write_text('{"life": ')
    assert read_status(run).standing == Standing.STOPPED
    with pytest.raises(CheckpointError, match="is no run folder"):
        read_status(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        read_status(tmp_path / "none")


def test_a_job_in_the_queue_is_asked_after(run, tmp_path, monkeypatch):
    """With a stand-in for squeue. Mutation seen caught: the job of the state taken though a newer one was submitted."""
    told(run, status="ended", exit_code=75, job_id="8", unix_s=5.0)
    (run / "launch" / "x").mkdir()
    (run / "launch" / "x" / "job.json").write_text('{"job_id": "12", "submitted_s": 6.0}')
    fake = tmp_path / "squeue"
    fake.write_text('#!/bin/sh\n[ "$3" = 12 ] && echo "PENDING|Priority|2026-11-22T08:00:00"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = read_status(run)
    assert found.standing == Standing.WAITING
    assert "job 12: Priority, expected to start: 2026-11-22T08:00:00" in describe(found)


def make_attempt(run: Path, name: str, *lines: str) -> Path:
    folder = run / "logs" / name.split("/")[0] / f"attempt_{name.split('/')[1]}"
    folder.mkdir(parents=True)
    (folder / "rank_00000.log").write_text("".join(f"{line}\n" for line in lines))
    return folder


def test_logs_of_the_newest_or_any_attempt(run, capfdbinary):
    told(run)
    make_attempt(run, "9.0/0", *map(str, range(300)))
    make_attempt(run, "9.0/1", "now")
    (run / "logs/9.0/attempt_0/first_error.txt").write_text("first error: rank 1\n")
    logs.show_log(run, 0, None, 100, follows=False)
    logs.show_log(run, 0, "9.0/0", 2, follows=False)
    logs.show_errors(run, None)
    assert capfdbinary.readouterr().out == b"now\n298\n299\nattempt 9.0/0:\nfirst error: rank 1\n"
    with pytest.raises(LaunchError, match=r"there are 9\.0/0, 9\.0/1"):
        logs.show_log(run, 0, "9.0/7", 2, follows=False)
    with pytest.raises(LaunchError, match="has logs of ranks 0 to 0"):
        logs.show_log(run, 5, None, 2, follows=False)


def test_tail_takes_whole_lines_from_the_end(tmp_path, monkeypatch):
    """Mutation seen caught: the line break at the end of the file counted as a line of its own."""
    monkeypatch.setattr(logs, "BLOCK_BYTES", 7)
    for text in ("", "a", "a\n", "a\nbb\n", "a\nbb\nccc", "\n\n\n", "long line without end" * 9, "1234\n" * 20):
        (tmp_path / "f").write_text(text)
        for lines in range(5):
            expected = "".join(text.splitlines(keepends=True)[-lines:])
            assert logs.tail(tmp_path / "f", lines).decode() == expected, (text, lines)


def test_follow_goes_on_in_the_next_attempt_until_the_run_ends(run, capfdbinary, monkeypatch):
    """Mutation seen caught: following ends with the first attempt."""
    monkeypatch.setattr(logs, "POLL_S", 0.02)
    monkeypatch.setattr(logs, "ASK_S", 0.05)
    told(run)
    first = make_attempt(run, "9.0/0", "one")
    thread = threading.Thread(target=lambda: logs.show_log(run, 0, None, 100, follows=True))
    thread.start()
    time.sleep(0.3)
    with (first / "rank_00000.log").open("a") as file:
        file.write("two\n")
    make_attempt(run, "9.0/1", "three")
    time.sleep(0.3)
    told(run, status="ended", exit_code=0)
    thread.join(10)
    assert not thread.is_alive()
    assert capfdbinary.readouterr().out == (
        b"--- attempt 9.0/0, rank 0\none\ntwo\n--- attempt 9.0/1, rank 0\nthree\n")


def test_follow_ends_quietly_when_its_reader_is_gone(run):
    """Mutation seen caught: without the look at the pipe it follows a silent log for ever."""
    told(run)
    make_attempt(run, "9.0/0", "one")
    process = subprocess.Popen([sys.executable, "-m", "launcher", "logs", str(run), "--follow"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    try:
        assert [process.stdout.readline() for _ in range(2)] == [b"--- attempt 9.0/0, rank 0\n", b"one\n"]
        process.stdout.close()
        assert process.wait(20) == 0
        assert process.stderr.read() == b""
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_stop_leaves_one_file_and_only_where_somebody_reads_it(run, capsys):
    """Mutation seen caught: a STOP left in the folder of a finished run, which would stop the next start."""
    told(run)
    stop.stop_run(run, only_saves=True)
    stop.stop_run(run)
    assert getpass.getuser() in (run / "STOP").read_text()
    assert sorted(path.name for path in run.iterdir() if path.name.isupper()) == ["SAVE", "STOP"]
    (run / "STOP").unlink()
    told(run, status="ended", exit_code=75)
    stop.stop_run(run)
    assert not (run / "STOP").exists()
    assert "there is nothing to stop" in capsys.readouterr().out
    with pytest.raises(LaunchError, match="nobody is there to save"):
        stop.stop_run(run, only_saves=True)
    with pytest.raises(LaunchError, match="can't go together"):
        stop.stop_run(run, only_saves=True, at_once=True)


def test_another_users_run_is_refused(run, monkeypatch):
    told(run)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    with pytest.raises(LaunchError, match=r"belongs to .*you are user 54321"):
        stop.stop_run(run)
    assert not (run / "STOP").exists()


def test_stop_now_signals_only_a_process_of_ours(run):
    """Mutation seen caught: the pid of the state trusted, though it's another program by now."""
    other = subprocess.Popen(["sleep", "60"])
    try:
        told(run, pid=other.pid, host=os.uname().nodename)
        with pytest.raises(LaunchError, match="nothing was signalled"):
            stop.stop_run(run, at_once=True)
        assert other.poll() is None
        told(run, pid=other.pid, host="elsewhere")
        with pytest.raises(LaunchError, match="on elsewhere"):
            stop.stop_run(run, at_once=True)
    finally:
        other.kill()
        other.wait()


def test_stop_now_cancels_the_job_by_its_id(run, tmp_path, monkeypatch):
    told(run, job_id="9")
    fake = tmp_path / "scancel"
    fake.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    stop.stop_run(run, at_once=True)
    assert (tmp_path / "asked").read_text() == "9\n"


@pytest.mark.parametrize("code", [75, 3])
def test_stop_waits_for_the_end(run, monkeypatch, code):
    monkeypatch.setattr(stop, "POLL_S", 0.02)
    told(run)
    timer = threading.Timer(0.2, lambda: told(run, status="ended", exit_code=code, last_fault="disk"))
    timer.start()
    if code == 75:
        stop.stop_run(run, waits=True)
    else:
        with pytest.raises(RankFailedError, match="disk"):
            stop.stop_run(run, waits=True)
    timer.join()
    assert read_status(run).state.status == "ended"
