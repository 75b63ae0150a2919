"""What a launch refuses: times, partitions, folders, second launches, secrets."""

import fcntl
import os
import socket
import subprocess
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.submit.run_folder import check_not_live, check_run_folder, remove_requests
from launcher.submit.scheduler import check_nodes, parse_gpus, parse_sinfo
from launcher.submit.snapshot import check_no_secrets, describe_code, hide_secrets, newest_job, write_job
from launcher.submit.time_limit import StepTime, check_time_limit, choose_step_time, parse_time_limit
from megascale.checkpoint.lease import RunLease
from megascale.config.cluster import ClusterConfig
from megascale.errors import ConfigError, LaunchError
from tests.support.fake_slurm import SINFO, write_launch_state

CANARY = "canary-3f9d1c77"


@pytest.mark.parametrize(("text", "seconds"), [
    ("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-0", 86400), ("1-12:30", 131400), ("2-00:00:05", 172805),
    ("UNLIMITED", float("inf")), ("infinite", float("inf")),
])
def test_the_forms_of_a_time_limit(text, seconds):
    """Mutation seen caught: `1:30` read as hours and minutes."""
    assert parse_time_limit(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0:00", "-5", "1h", "1:2:3:4", "1-", "1.5", "10 min"])
def test_other_forms_are_refused(text):
    with pytest.raises(LaunchError, match="not a time limit of SLURM; write MINUTES"):
        parse_time_limit(text)


@given(days=st.integers(0, 30), hours=st.integers(0, 23), minutes=st.integers(0, 59), seconds=st.integers(1, 59))
def test_a_full_time_limit_is_the_sum_of_its_parts(days, hours, minutes, seconds):
    expected = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    assert parse_time_limit(f"{days}-{hours:02}:{minutes:02}:{seconds:02}") == expected


def test_a_time_limit_holds_a_save_interval_and_the_warning():
    """Mutations seen caught: the grace left out of the sum; `<` in place of `<=`."""
    step = StepTime(2.0, "measured in this run")
    check_time_limit("6", 120, 100, step)  # 360 s against 320
    check_time_limit("3", 120, 100, None)
    with pytest.raises(LaunchError, match=r"interval_steps 100 x 2 s a step \(measured in this run\) \+ grace_s 120 s ="
                                          r" 320 s; give --time 6 or more"):
        check_time_limit("5:20", 120, 100, step)
    with pytest.raises(LaunchError, match="--time 2 is 120 s, and the job is warned grace_s = 120 s before its end"):
        check_time_limit("2", 120, 100, None)


def test_the_step_time_is_measured_or_a_bound_by_flops():
    metrics = [{"kind": "train", "step_s": 3.0}, {"kind": "train", "step_s": 2.5}, {"kind": "eval"}]
    sessions = [{"unix_s": 1.0, "world_size": 8}, {"unix_s": 2.0, "world_size": 4}]
    assert choose_step_time(metrics, sessions, 4, 1000, 10, None) == StepTime(2.5, "measured in this run")
    assert choose_step_time(metrics, sessions, 8, 1000, 10, None) is None, "the newest session had other ranks"
    assert choose_step_time([], [], 2, 1000, 10, 100.0).seconds == 50.0


@pytest.mark.parametrize(("gres", "gpus"), [
    ("(null)", {}), ("gpu:2", {"": 2}), ("gpu:h100:8(S:0-1)", {"h100": 8}),
    ("gpu:a:1,gpu:b:2,nvme:4", {"a": 1, "b": 2}), ("gpu:2(S:0),gpu:2(S:1)", {"": 4}), ("craynetwork:4", {}),
])
def test_gpus_of_generic_resources(gres, gpus):
    assert parse_gpus(gres) == gpus


def cluster(**values) -> ClusterConfig:
    return ClusterConfig(**{"ranks_per_node": 1} | values)


def test_the_partition_is_that_asked_for_or_the_default():
    groups = parse_sinfo(SINFO)
    assert check_nodes(groups, cluster(gpus_per_node=2), 4, "23:00:00") == "debug"
    assert check_nodes(groups, cluster(gpus_per_node=8, partition="big", gpu_type="h100"), 2, "9-0") == "big"
    assert check_nodes(groups, cluster(gpus_per_node=8, gpu_request="none"), 4, None) == "debug"


@pytest.mark.parametrize(("values", "nodes", "time", "message"), [
    ({"partition": "debgu"}, 1, None, r"'debgu': no such partition; did you mean 'debug'\? there are: debug, big, old"),
    ({"partition": "old"}, 1, None, "partition old is down, so no job starts in it; up are: big, debug"),
    ({"gpus_per_node": 8}, 1, None, r"asked for 8 GPUs on a node, and nodes of partition debug have 2 \(2 gpu\)"),
    ({"gpus_per_node": 8, "gpu_type": "a100", "partition": "big"}, 1, None, r"of type a100 .*have none \(8 h100"),
    ({}, 5, None, "asked for 5 nodes, spares included, and partition debug has 4 that fit; use 4"),
    ({}, 1, "1-00:00:01", "--time 1-00:00:01 is longer than the limit of partition debug, 1-00:00:00"),
])
def test_what_a_partition_can_never_run_is_refused(values, nodes, time, message):
    """Mutations seen caught: GPUs counted over all types; groups of other partitions counted as nodes."""
    with pytest.raises(LaunchError, match=message):
        check_nodes(parse_sinfo(SINFO), cluster(**values), nodes, time)


def test_without_a_default_partition_one_is_asked_for():
    with pytest.raises(LaunchError, match="no default partition; give --partition, one of: debug, big, old"):
        check_nodes(parse_sinfo(SINFO.replace("*", "")), cluster(), 1, None)


def test_a_run_folder_is_made_or_ones_own(tmp_path):
    check_run_folder(tmp_path / "new" / "run")
    check_run_folder(tmp_path)
    assert not (tmp_path / "new").exists(), "a check writes nothing"


def test_a_folder_that_others_write_to_is_refused_with_owner_and_mode(tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(LaunchError, match=r"anybody may write to it \(owner \w+, mode 0777\).*chmod o-w"):
        check_run_folder(tmp_path)


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(LaunchError, match="file: is not a folder"):
        check_run_folder(tmp_path / "file" / "run")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(LaunchError, match="is a link to nothing"):
        check_run_folder(tmp_path / "link" / "run")


def test_another_users_folder_is_refused(tmp_path, monkeypatch):
    """Mutation seen caught: the owner not compared."""
    monkeypatch.setattr(os, "getuid", lambda: os.stat(tmp_path).st_uid + 1)
    with pytest.raises(LaunchError, match=r"another user's folder \(owner \w+, mode 0\d+\), and you are"):
        check_run_folder(tmp_path)
    check_run_folder(tmp_path / "run")  # beside others' files one may make one's own


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(LaunchError, match=r"can't be written: .* mode 0500"):
        check_run_folder(tmp_path / "run")


def never(job_id: str) -> bool:
    return False


def test_a_run_with_a_job_in_the_queue_is_refused(tmp_path):
    """Also one that has never started. Mutations seen caught: only the state looked at; the oldest job.json read."""
    for name, job in (("20260101-000000-aaaa", "76"), ("20260102-000000-aaaa", "77")):
        (tmp_path / "launch" / name).mkdir(parents=True)
        write_job(tmp_path / "launch" / name, job, ["sbatch"])
    (tmp_path / "launch" / "20260103-000000-aaaa").mkdir()  # of a launch on this machine
    assert newest_job(tmp_path) == "77"
    asked = []
    with pytest.raises(LaunchError, match=r"is live: job 77, which waits or runs. Stop it first \(megascale stop .* or"
                                          " scancel 77"):
        check_not_live(tmp_path, lambda job: asked.append(job) or job == "77")
    assert asked == ["77"]
    check_not_live(tmp_path, never)


def test_a_launch_that_writes_its_state_is_live(tmp_path):
    """Mutations seen caught: an ended state taken for live; a killed launch's pid not looked at."""
    now_s = time.time()
    write_launch_state(tmp_path, unix_s=now_s, job_id="", pid=12, status="running")
    with pytest.raises(LaunchError, match="is live: process 12 on elsewhere"):
        check_not_live(tmp_path, None, now_s)
    check_not_live(tmp_path, None, now_s + 61)
    write_launch_state(tmp_path, unix_s=now_s, status="ended")
    check_not_live(tmp_path, None, now_s)
    write_launch_state(tmp_path, unix_s=now_s, job_id="", host=socket.gethostname(), pid=os.getpid())
    with pytest.raises(LaunchError, match=f"process {os.getpid()}"):
        check_not_live(tmp_path, None, now_s)
    write_launch_state(tmp_path, unix_s=now_s, job_id="", host=socket.gethostname(), pid=2**22 + 1)
    check_not_live(tmp_path, None, now_s)


def test_the_scheduler_knows_better_than_an_old_or_a_fresh_state(tmp_path):
    """A requeued job waits for hours without writing; a job killed a second ago left a fresh state behind."""
    write_launch_state(tmp_path, unix_s=time.time() - 9999, status="requeued", job_id="77")
    with pytest.raises(LaunchError, match="is live: job 77"):
        check_not_live(tmp_path, lambda job: True)
    write_launch_state(tmp_path, unix_s=time.time(), job_id="77")
    check_not_live(tmp_path, never)
    with pytest.raises(LaunchError, match=r"is live: job 77 \(running"):
        check_not_live(tmp_path, None)


def test_a_held_lease_makes_a_run_live(tmp_path):
    """As `megascale train` holds it. Mutation seen caught: the lock not tried, so that any lease.json refuses."""
    with RunLease.take(tmp_path):
        with pytest.raises(LaunchError, match=f"is live: process {os.getpid()} on"):
            check_not_live(tmp_path, never)
    (tmp_path / "lease.json").write_text(f'{{"host": "{socket.gethostname()}", "pid": 5}}')  # of a killed run
    check_not_live(tmp_path, never)
    with (tmp_path / "lease.json").open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the check has left it as it was


def test_a_lease_of_another_machine_counts_while_it_beats(tmp_path):
    path = tmp_path / "lease.json"
    path.write_text('{"host": "elsewhere", "boot_id": "b", "pid": 5, "started": "today", "token": "t"}')
    with pytest.raises(LaunchError, match="process 5 on elsewhere"):
        check_not_live(tmp_path, None)
    os.utime(path, (1.0, 1.0))
    check_not_live(tmp_path, None)


def test_requests_of_an_earlier_launch_are_removed(tmp_path):
    (tmp_path / "STOP").touch()
    (tmp_path / "SAVE").touch()
    remove_requests(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_secret_in_a_kept_file_is_refused_without_its_value():
    environment = {"MY_TOKEN": CANARY, "SHORT_TOKEN": "1", "MY_KEY_FILE": "/etc/hostname", "PLAIN": "folder"}
    with pytest.raises(ConfigError, match=r"run.yaml: holds the value of \$MY_TOKEN") as raised:
        check_no_secrets(f"folder: /runs/{CANARY}", "run.yaml", environment)
    assert CANARY not in str(raised.value)
    check_no_secrets("folder: /etc/hostname 1", "run.yaml", environment)


def git(folder, *arguments):
    subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", "-C", folder, *arguments], check=True,
                   capture_output=True)


def test_the_diff_of_the_code_leaves_secrets_out(tmp_path):
    """Mutations seen caught: the excluded patterns dropped; the values not replaced."""
    git(tmp_path, "init", "-q")
    names = ("code.py", ".env", "deploy/.env.local", "server.pem", "My_Key.txt", "tokenizer.py")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old\n")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "x")
    assert describe_code(tmp_path, {})[1:] == (
        "", {"dirty": False, "untracked": [], "left_out_of_diff": [], "diff_cut_at_bytes": None})
    for name in names:
        (tmp_path / name).write_text(f"new {CANARY if name == 'code.py' else 'private'} https://u:pw@host/x\n")
    (tmp_path / "notes.txt").write_text(CANARY)
    commit, diff, facts = describe_code(tmp_path, {"WANDB_API_KEY": CANARY})
    assert len(commit) == 40
    assert "+new <WANDB_API_KEY> https://***@host/x" in diff
    assert "tokenizer.py" in diff
    assert CANARY not in diff
    assert "u:pw" not in diff
    assert diff.count("private") == 1
    assert facts["left_out_of_diff"] == [".env", "My_Key.txt", "deploy/.env.local", "server.pem"]
    assert facts["untracked"] == ["notes.txt"]
    assert facts["dirty"] is True


def test_a_long_diff_is_cut_and_says_so(tmp_path):
    """In seconds. Mutation seen caught: `redact` on the whole text, which took the square of a line's length."""
    git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("old\n")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "x")
    (tmp_path / "a").write_text("é" * (1 << 20) + "\n" + "x" * (1 << 20) + "https://u:pw@host\n")
    _, diff, facts = describe_code(tmp_path, {})
    assert len(diff.encode("utf-8", "surrogateescape")) == 1 << 20
    assert facts["diff_cut_at_bytes"] == 1 << 20


def test_a_repository_around_installed_code_is_not_the_codes(tmp_path):
    """Mutation seen caught: the top of the repository not compared."""
    git(tmp_path, "init", "-q")
    (tmp_path / "site-packages").mkdir()
    assert describe_code(tmp_path / "site-packages", {}) == (None, "", {"dirty": None})


def test_the_longest_secret_is_hidden_first():
    environment = {"A_TOKEN": CANARY, "B_TOKEN": CANARY + "-more"}
    assert hide_secrets(CANARY + "-more", environment) == "<B_TOKEN>"
