"""Whole pre-flights with real node programs on this machine, sound ones and broken ones."""

import contextlib
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

from launcher.submit.plan import LaunchPlan
from launcher.supervise.preflight_round import PreflightRound, build_needs, write_report
from megascale.config.cluster import ClusterConfig, PreflightConfig

REPOSITORY = Path(__file__).resolve().parents[2]
HEAD = """
import json, os, resource, sys, time
import launcher.supervise.preflight as node, launcher.supervise.preflight_checks as checks
import launcher.supervise.preflight_network as network
request = json.loads(sys.argv[1])
checks.check_product = lambda *_: {}  # it has tests of its own
"""
TAIL = "\nnode.main(json.dumps(request))"
LATE = "measure = node.measure_gbps; node.measure_gbps = lambda *peer: (time.sleep(1), measure(*peer))[1]"
BROKEN = {
    "clock": ("node.time = type('Time', (), {'time': staticmethod(lambda: time.time() - 60), "
              "'monotonic': staticmethod(time.monotonic)})", r"clock: -60\.\d s from the median"),
    "folder": ("checks.TOKEN_WAIT_S = 0.5; os.makedirs(request['run_folder'] + '_local', exist_ok=True);"
               "request.update(run_folder=request['run_folder'] + '_local', "
               "token_file=request['run_folder'] + '_local/token')", "not the same as the controller's"),
    "code": ("checks.fingerprint_code = lambda root: 'stale'", "other code of megascale: stale"),
    "hung": ("checks.FOLDER_S = 3.0; local = request['run_folder'] + '_fifo'; os.mkfifo(local);"
             "checks.check_readable = lambda path: open(local)", r"data folder .* did not answer within \d s.*mounted"),
    "slow": ("drain = network._drain; network._drain = lambda connection: (drain(connection)[0], 60.0);"
             "node.measure_gbps = lambda *_: 0.001", "network: .*0.001 Gbit/s.*limit 0.05"),
    "files": ("resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))", "limit of open files: 200, limit 1024"),
    "cores": ("os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); request['cores'] = 2",
              "cores: 1 for this job, 2 wanted"),
    "gpus": ("request['gpus'] = 1", "GPUs: 0 visible, 1 wanted"),
    "dead": ("os._exit(7)", "exit code 7"),
}


class Nodes:
    """The programs of some nodes, and what an agent does for each: lines in, text out.

    Args:
        programs: Python code by node; None runs the program as an agent does.
    """

    def __init__(self, programs):
        self._programs, self.processes, self._heard = programs, {}, queue.Queue()

    def send(self, node, message):
        if message["type"] == "preflight":
            code = self._programs[node]
            command = ["-m", "launcher.supervise.preflight"] if code is None else ["-c", HEAD + code + TAIL]
            process = self.processes[node] = subprocess.Popen(
                [sys.executable, *command, message["request"]], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                cwd=REPOSITORY, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            )
            threading.Thread(target=self._relay, args=(node, process), daemon=True).start()
        else:
            with contextlib.suppress(OSError):
                self.processes[node].stdin.write((message["line"] + "\n").encode())
                self.processes[node].stdin.flush()

    def _relay(self, node, process):
        while text := process.stdout.read1():
            self._heard.put((node, text.decode()))
        self._heard.put((node, None))

    def run(self, preflight):
        preflight.begin()
        while not preflight.is_over():
            with contextlib.suppress(queue.Empty):
                node, text = self._heard.get(timeout=0.1)
                if text is None:
                    preflight.on_end(node, self.processes[node].wait())
                else:
                    preflight.on_text(node, text)
        return preflight.verdict()

    def end(self):
        for process in self.processes.values():
            process.kill()
            process.wait()
            process.stdout.close()
            with contextlib.suppress(OSError):
                process.stdin.close()


def run_round(folder, programs, **limits):
    """One pre-flight; returns its verdict and the exit codes of the programs that end within 5 s."""
    plan = LaunchPlan(
        run_name="run", run_folder=str(folder / "run"), config="unread", nodes=len(programs), ranks_per_node=1,
        cluster=ClusterConfig(ranks_per_node=1), data_folders=(str(folder),),
    )
    nodes = Nodes(programs)
    preflight = PreflightRound(
        dict.fromkeys(programs, "127.0.0.1"), PreflightConfig(**limits), build_needs(plan, "test.0"), nodes.send,
        time.monotonic,
    )
    try:
        verdict = nodes.run(preflight)
        write_report(folder / "preflight.json", verdict)
        return verdict, {node: process.wait(5) for node, process in nodes.processes.items()}
    finally:
        nodes.end()


def test_three_sound_nodes_pass_with_all_checks_done(tmp_path):
    """Seen to catch: no `done`."""
    verdict, codes = run_round(tmp_path, {"a": None, "b": None, "c": None}, limit_s=60.0)
    assert verdict.bad == {}, verdict.bad
    assert verdict.good == ["a", "b", "c"]
    assert verdict.notes == ()
    assert set(codes.values()) == {0}
    written = json.loads((tmp_path / "preflight.json").read_text())
    for node in "abc":
        report = written["reports"][node]
        assert len(report["seconds"]) >= 15
        assert [device["wrong"] for device in report["facts"]["devices"]] == [{"fp32": 0}]
        assert {test["peer"] for test in report["facts"]["bandwidth"]} == set("abc") - {node}
        assert all(test["gbps"] > 0.05 for test in report["facts"]["bandwidth"])
        assert abs(report["clock_s"]) <= 0.1 + report["clock_error_s"]
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != "preflight.token"]


def test_every_broken_node_is_named_for_its_own_fault(tmp_path):
    """A fault on each of nine nodes at once, beside four sound ones: one reason each, and no other node is bad.

    Seen to catch: no answer to the question for the time; a program that ends before the others have sent to it.
    """
    programs = {"first": "", "second": ""} | {name: code for name, (code, _) in BROKEN.items()} | {"y": "", "z": LATE}
    verdict, codes = run_round(tmp_path, programs, limit_s=60.0)
    for name, (_, pattern) in BROKEN.items():
        assert_one_reason(verdict.bad.get(name), pattern)
    assert set(verdict.bad) == set(BROKEN), verdict.bad
    assert verdict.notes == ()  # whoever sends late is served too
    assert verdict.seconds < 60
    assert {code for name, code in codes.items() if name != "dead"} == {0}


def assert_one_reason(reasons, pattern):
    assert reasons is not None, pattern
    assert len(reasons) == 1, reasons
    assert re.search(pattern, reasons[0]), reasons[0]
