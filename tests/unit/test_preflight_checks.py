"""The checks of a pre-flight on one node, each with something broken."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.supervise import preflight_checks as checks
from launcher.supervise.preflight import run_checks
from launcher.supervise.preflight_checks import Check
from launcher.supervise.preflight_network import TOKEN_BYTES, Sink, measure_gbps
from megascale.errors import LaunchError
from megascale.train import node_check
from tests.support.ranks import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
TOKEN = "t" * TOKEN_BYTES


@pytest.fixture
def shared(tmp_path):
    """A run folder with the controller's token in it."""
    (tmp_path / "logs").mkdir()
    token_file = tmp_path / "logs" / "preflight.token"
    token_file.write_text("abc")
    return tmp_path, token_file


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(checks, "TOKEN_WAIT_S", 0.2)


@pytest.mark.parametrize("damage", ["one element", "one row", "nan"])
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_any_wrong_row_is_counted(damage, kind):
    left, right = node_check.draw_matrices(64)[kind]
    product = left @ right
    assert node_check.count_wrong_rows(left, right, product) == 0
    product[7, slice(9, 10) if damage == "one element" else slice(None)] += float("nan") if damage == "nan" else 2
    assert node_check.count_wrong_rows(left, right, product) == 1


def test_a_device_that_computes_differently_now_and_then_is_wrong(monkeypatch):
    calls = []

    def flaky(left, right):
        calls.append(1)
        return left @ right + (len(calls) == 2)  # the first is right

    monkeypatch.setattr(node_check, "multiply", flaky)
    assert node_check.check_cpu()["wrong"] == {"fp32": 1}


def test_torch_multiplies_exactly_too():
    """What GPUs do, here on torch's CPU: bf16 as well as fp32."""
    assert node_check.check_tensors("cpu", 64, 2)["wrong"] == {"fp32": 0, "bf16": 0}


def test_torch_is_not_imported_on_a_cpu_node(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch')")
    done = subprocess.run([sys.executable, "-m", "megascale.train.node_check", "0"], capture_output=True, check=False,
                          cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("program", "message"), [
    ("import megascale.train.node_check as n; n.multiply = lambda a, b: a @ b + (n.np.arange(512) == 5)[:, None]\n"
     "n.main(0)", "cpu computes wrong results .1 wrong rows in fp32."),
    ("import megascale.train.node_check as n\ndef fail(a, b): raise RuntimeError('device-side assert')\n"
     "n.multiply = fail; n.main(0)", "exit code 1: RuntimeError: device-side assert"),
    ("print('{\"devices\": [{\"device\": \"cuda:3\", \"error\": \"ECC error\"}]}')", "cuda:3 failed: ECC error"),
    ("import sys; print('libcudart.so.12: cannot open', file=sys.stderr); sys.exit(3)",
     "exit code 3: libcudart.so.12: cannot open"),
    ("import time; time.sleep(60)", "no answer within 0.5 s"),
])
def test_a_bad_device_is_described(program, message, tmp_path, monkeypatch):
    (tmp_path / "bad_product.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{REPOSITORY}")
    with pytest.raises(LaunchError, match=message):
        checks.check_product(["bad_product", "0"], 0.5 if "sleep" in program else 60)


def test_the_run_folder_is_shared_and_nothing_is_left_in_it(shared):
    folder, token_file = shared
    assert checks.check_shared(folder, token_file, "abc") == {"is_shared": True}
    assert [path.name for path in folder.iterdir()] == ["logs"]


@pytest.mark.parametrize("damage", ["missing", "other"])
def test_a_folder_of_the_same_name_on_a_local_disk_is_found_out(damage, shared, impatient):
    folder, token_file = shared
    token_file.unlink() if damage == "missing" else token_file.write_text("xyz")
    with pytest.raises(LaunchError, match=r"not the same as the controller's.*shar"):
        checks.check_shared(folder, token_file, "abc")


def test_a_token_that_comes_late_is_waited_for(shared):
    folder, token_file = shared
    token_file.unlink()
    threading.Timer(0.3, token_file.write_text, ("abc",)).start()
    assert checks.check_shared(folder, token_file, "abc") == {"is_shared": True}


def test_a_run_folder_that_can_not_be_written_is_named(tmp_path):
    """A folder below a file: nobody may write there, not even root."""
    (tmp_path / "file").touch()
    with pytest.raises(LaunchError, match=f"run folder {tmp_path}/file/run: can't be written .Not a directory"):
        checks.check_shared(tmp_path / "file" / "run", tmp_path / "token", "abc")


def test_data_folders_are_read(tmp_path, monkeypatch):
    (tmp_path / "shard.tar").write_bytes(b"x")
    assert checks.check_readable(tmp_path) == {}
    with pytest.raises(LaunchError, match=r"none: can't be read .No such file"):
        checks.check_readable(tmp_path / "none")

    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("builtins.open", refuse)  # root would be let in
    with pytest.raises(LaunchError, match=r"shard.tar: can't be read .Permission denied"):
        checks.check_readable(tmp_path)


def test_a_file_system_without_inodes_is_named(monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_files=10, f_favail=0, f_bavail=9, f_frsize=9))
    with pytest.raises(LaunchError, match="/x: no inodes left"):
        checks.measure_disk("shm", Path("/x"))


def test_disk_space_counts_what_this_user_may_use(monkeypatch):
    system = SimpleNamespace(f_files=0, f_favail=0, f_bavail=3 << 18, f_bfree=9 << 18, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda path: system)
    assert checks.measure_disk("shm", Path("/x")) == {"shm_gib": 3.0, "shm_path": "/x"}


def test_memory_is_that_of_the_control_group_when_it_has_less(monkeypatch):
    monkeypatch.setattr(checks, "_group_room", lambda: [3 << 30, 1 << 28])
    assert checks.measure_memory() == {"memory_gib": 0.25}


def test_an_address_of_another_node_is_refused():
    assert checks.check_port("127.0.0.1") == {"address": "127.0.0.1"}
    with pytest.raises(LaunchError, match=r"can't listen at 192.0.2.1 .*interface"):
        checks.check_port("192.0.2.1")  # of a block kept for documentation


def test_the_fingerprint_changes_with_any_file(tmp_path):
    for top in ("launcher", "megascale"):
        (tmp_path / top).mkdir()
        (tmp_path / top / "a.py").write_text("1")
    before = checks.fingerprint_code(tmp_path)
    (tmp_path / "megascale" / "a.py").write_text("2")
    changed = checks.fingerprint_code(tmp_path)
    (tmp_path / "megascale" / "a.py").rename(tmp_path / "megascale" / "b.py")
    assert len({before, changed, checks.fingerprint_code(tmp_path)}) == 3


@pytest.mark.parametrize(("script", "message"), [
    ("exec sleep 30", "no answer within 0.5 s: the driver hangs"),
    ("echo 'NVIDIA-SMI has failed'; exit 9", "exit code 9: NVIDIA-SMI has failed"),
])
def test_a_sick_nvidia_driver_is_named(script, message, tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(checks, "TOOL_S", 0.5)
    with pytest.raises(LaunchError, match=message):
        checks.read_nvidia_smi()


def test_ranks_left_behind_are_found():
    code = "import sys; print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, "megascale.train.rank"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as rank:
        rank.stdout.readline()
        assert rank.pid in checks.find_leftovers()["leftover_ranks"]


def test_a_hung_folder_holds_up_nothing(tmp_path):
    """A read that blocks in the kernel, as on a dead file server: here of a pipe that nobody opens for writing.

    Seen to catch: the checks run one after the other; `wait` without a limit.
    """
    token_file = tmp_path / "token"
    os.mkfifo(token_file)
    began_s = time.monotonic()
    facts, problems, seconds = run_checks([
        Check("run folder /x", lambda: checks.check_shared(tmp_path, token_file, "abc"), 0.5, "is it mounted?"),
        Check("good", lambda: {"gpus": 1}),
        Check("late", lambda: time.sleep(5) or {}, 60),
        Check("odd", lambda: {}["no"], is_information=True),
        Check("bug", lambda: {}["no"]),
    ], began_s + 1)
    assert time.monotonic() - began_s < 3
    assert facts == {"gpus": 1, "unknown": ["odd: KeyError: 'no'"]}
    assert problems == {
        "run folder /x": "run folder /x: did not answer within 0.5 s: is it mounted?",
        "late": "late: did not answer within 1 s", "bug": "bug: KeyError: 'no'",
    }
    assert "good" in seconds
    assert "late" not in seconds
    os.close(os.open(token_file, os.O_WRONLY | os.O_NONBLOCK))  # lets the thread end


def test_bandwidth_is_measured_and_strangers_are_not_served():
    sink = Sink("127.0.0.1", TOKEN)
    assert measure_gbps("127.0.0.1", sink.port, TOKEN) > 0.05
    with pytest.raises(LaunchError):
        measure_gbps("127.0.0.1", sink.port, "x" * TOKEN_BYTES)


def test_a_closed_port_is_described():
    with pytest.raises(LaunchError, match="Connection refused"):
        measure_gbps("127.0.0.1", free_port(), TOKEN)


def test_the_program_refuses_what_is_no_request():
    done = subprocess.run([sys.executable, "-m", "launcher.supervise.preflight", json.dumps({"limit_s": 1})],
                          cwd=REPOSITORY, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    assert done.stderr.startswith("error: not a request of the pre-flight: 'host'")
    assert "Traceback" not in done.stderr
