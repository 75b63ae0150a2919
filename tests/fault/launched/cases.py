"""Faults of a launched run on virtual nodes of one machine; the rows are those of the list of faults."""

import os
import signal
import socket
import time
from pathlib import Path

from megascale.errors import EXIT_CRASH_LOOP, EXIT_USER
from megascale.train.signals import LOOK_INTERVAL_S
from tests.fault.launched.score import Case
from tests.support.faulty_run import child_pids, is_alive, send_signal, wait_until
from tests.support.launched_run import LaunchedRun, Shape, environment_of

SPARE = Shape(spares=1)
MODEL_PARALLEL = Shape(ranks_per_node=4, changes={"parallel": {"zero_stage": 1, "tp": 2, "pp": 2}})
DEEP_PIPELINE = Shape(nodes=2, ranks_per_node=2, changes={
    "parallel": {"zero_stage": 1, "pp": 4}, "model": {"num_layers": 4},
})
SYNCHRONOUS = Shape(changes={"checkpoint": {"interval_steps": 3, "keep_last": 3, "asynchronous": False}})
LONG = {"train": {"max_steps": 36}, "checkpoint": {"interval_steps": 6, "keep_last": 3}}
ORPHANS_S = 10.0
DOWN_S = 30.0


def fault(act: str, phase: str = "forward", *, rank: int = 3, step: int | None = 7, **more) -> dict:
    """A fault for the plan; `step=None` is any step."""
    return {"act": act, "phase": phase, "rank": rank, **({} if step is None else {"step": step}), **more}


PAUSE = (fault("pause"),)


def lose_node(run: LaunchedRun) -> None:
    """The node of the faulty rank goes out."""
    run.wait_for_fault()
    run.signal_node("local1")


def kill_agent(run: LaunchedRun) -> None:
    """The agent alone dies; the kernel tells its ranks."""
    run.wait_for_fault()
    ranks = child_pids(run.agent("local1"))
    os.kill(run.agent("local1"), signal.SIGKILL)
    wait_until(lambda: not any(is_alive(pid) for pid in ranks), timeout_s=ORPHANS_S)


def kill_controller(run: LaunchedRun) -> None:
    """Nobody supervises any more: agents and ranks end by themselves."""
    run.wait_for_fault()
    agents = child_pids(run.process.pid)
    os.kill(run.process.pid, signal.SIGKILL)
    wait_until(lambda: run.is_down() and not any(is_alive(pid) for pid in agents), timeout_s=ORPHANS_S)


def freeze_node(run: LaunchedRun) -> None:
    """A node freezes, is replaced, and wakes when the next attempt trains: its ranks must end and write nothing."""
    run.wait_for_fault()
    ghosts = run.pids("local1")
    for pid in ghosts:
        send_signal(pid, signal.SIGSTOP)
    wait_until(lambda: (state := run.state()) is not None and state.attempt >= 1 and state.step >= 7, run.text, 240)
    for pid in ghosts:
        send_signal(pid, signal.SIGCONT)
    wait_until(lambda: not any(is_alive(pid) for pid in ghosts), run.text, ORPHANS_S)


def ask_by_file(name: str):
    """The kill switch or the save switch."""
    def act(run: LaunchedRun) -> None:
        run.wait_for_fault()
        (run.run_folder / name).touch()
        time.sleep(LOOK_INTERVAL_S)  # the next look comes then; what is left of the run may be shorter
        run.go_on()
        if name == "STOP":
            run.wait()
            (run.run_folder / name).unlink()
        else:
            wait_until(lambda: not (run.run_folder / name).exists(), run.text)

    return act


def knock(run: LaunchedRun) -> None:
    """Strangers connect to the controller and to the store, say nonsense or nothing, and stay."""
    paused = run.wait_for_fault()
    words = environment_of(paused["pid"])
    command = Path(f"/proc/{run.agent('local1')}/cmdline").read_text().split("\0")
    host, _, port = command[command.index("--controller") + 1].rpartition(":")
    strangers = [socket.create_connection((host, int(port)), timeout=5) for _ in range(3)]
    strangers.append(socket.create_connection((words["MASTER_ADDR"], int(words["MASTER_PORT"])), timeout=5))
    strangers[0].sendall(b'{"node": "local1", "proof": "00"}\n')
    strangers[1].sendall(os.urandom(512))
    strangers[3].sendall(os.urandom(512))
    time.sleep(1)
    run.go_on()
    run.wait()
    for stranger in strangers:
        stranger.close()


CASES = [
    *(Case(f"SIGKILL of rank 3, {phase}", (1,), (fault("kill", phase),), "rank 3 on local1", "SIGKILL")
      for phase in ("forward", "backward", "reduce", "update", "log")),
    Case("SIGKILL of rank 3, evaluate", (1,), (fault("kill", "evaluate", step=8),), "rank 3 on local1", "SIGKILL"),
    Case("SIGKILL of rank 0, the store's host", (2,), (fault("kill", rank=0),), "rank 0 on local0", "SIGKILL"),
    Case("SIGKILL of a tp peer and ZeRO owner", (3,), (fault("kill", rank=1),), "rank 1 on local0", "SIGKILL",
         shape=MODEL_PARALLEL),
    Case("SIGKILL of a last pipeline stage", (3,), (fault("kill", rank=7),), "rank 7 on local1", "SIGKILL",
         shape=MODEL_PARALLEL),
    Case("SIGKILL of a middle pipeline stage", (3,), (fault("kill", rank=2),), "rank 2 on local1", "SIGKILL",
         shape=DEEP_PIPELINE),
    Case("a node lost, spare taken", (4,), PAUSE, "local1", "agent is gone", act=lose_node, shape=SPARE),
    Case("segmentation fault", (5,), (fault("segv"),), "rank 3 on local1", "SIGSEGV"),
    Case("abort", (5,), (fault("abort"),), "rank 3 on local1", "SIGABRT"),
    Case("os._exit(3)", (5,), (fault("exit"),), "rank 3 on local1", "exit code 3"),
    Case("exception", (5,), (fault("raise"),), "rank 3 on local1", "RuntimeError: planned failure"),
    Case("exit 0 too early", (5,), (fault("exit", code=0),), "rank 3 on local1", "exit code 0"),
    Case("out of memory in a cgroup", (6,), (fault("memory"),), "rank 3 on local1", r"out of memory.*limit 0\.06 GiB"),
    Case("agent killed", (7,), PAUSE, "local1", "agent is gone", act=kill_agent),
    Case("controller killed, same command again", (7,), PAUSE, act=kill_controller, is_started_again=True,
         num_attempts=1),
    Case("data thread dies", (8,), (fault("raise", "read"),), "rank 3 on local1", "planned failure"),
    Case("data thread hangs", (8, 16), (fault("block", "read"),), "rank 3 on local1", "data"),
    Case("again while it joins", (9,), (fault("kill"), fault("kill", "join", rank=1, step=None, attempt=1)),
         "rank 3 on local1", "SIGKILL", num_attempts=3),
    Case("again while it loads", (9,), (fault("kill"), fault("kill", "load", rank=1, step=None, attempt=1)),
         "rank 3 on local1", "SIGKILL", num_attempts=3),
    Case("again before the first step", (9,), (fault("kill"), fault("kill", "begin", rank=1, step=None, attempt=1)),
         "rank 3 on local1", "SIGKILL", num_attempts=3),
    Case("crash loop at a step", (10,), (fault("raise", step=1, is_repeated=True),), "rank 3 on local1", "planned",
         exit_code=EXIT_CRASH_LOOP, num_attempts=3, is_completed=False),
    Case("SIGSTOP of rank 3", (11,), (fault("stop"),), "rank 3 on local1", "stopped"),
    Case("interpreter's lock held", (12,), (fault("gil"),), "rank 3 on local1", "compute"),
    Case("straggler of 10 %", (14,), (fault("slow", seconds=0.02),), options={"step_s": 0.2}, num_attempts=1,
         heard="straggler: rank 3 on local1", shape=Shape(changes=LONG)),
    Case("straggler of 5x, spare taken", (14,), (fault("slow", seconds=0.8, attempt=0),), options={"step_s": 0.2},
         heard=r"straggler: rank 3 on local1(.|\n)*attempt 1: 4 ranks on local0, local2",
         shape=Shape(spares=1, changes=LONG)),
    Case("desync: a collective left out", (15,), (fault("skip", "reduce"),), "rank 3 on local1", ""),
    Case("desync: another collective", (15,), (fault("other", "agree"),), "rank 3 on local1", ""),
    Case("storage hangs in a save", (16,), (fault("block", "write", step=6),), "rank 3 on local1", "save",
         shape=SYNCHRONOUS),
    Case("storage hangs in a load", (9, 16), (fault("kill"), fault("block", "load", step=None, attempt=1)),
         "rank 3 on local1", "SIGKILL", num_attempts=3),
    Case("strangers at controller and store", (20, 59), PAUSE, act=knock, num_attempts=1),
    Case("frozen node wakes as a ghost", (13, 21), (fault("pause"), fault("slow", seconds=0.2)), "local1",
         "said nothing", act=freeze_node, shape=SPARE, num_attempts=None),
    Case("same node at fault twice", (51,), (fault("kill"), fault("kill", step=10)), "rank 3 on local1", "SIGKILL",
         heard="attempt 2: 4 ranks on local0, local2", shape=SPARE, num_attempts=3),
    Case("kill switch, then the same command", (52,), PAUSE, act=ask_by_file("STOP"), is_started_again=True),
    Case("save switch", (52,), PAUSE, act=ask_by_file("SAVE"), num_attempts=1),
    Case("bad input", (10,), (fault("refuse", "build", step=None),), "rank 3 on local1", "planned refusal",
         exit_code=EXIT_USER, num_attempts=1, is_completed=False),
]


def find(name: str) -> Case:
    """A case by its name."""
    return next(case for case in CASES if case.name == name)
