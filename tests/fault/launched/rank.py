"""A rank of a launched run that commits planned faults, each at most once in the run unless it says otherwise.

The file named by MEGASCALE_TEST_PLAN holds JSON: {"folder": where moments are noted, "step_s": how long each step takes
besides its work, "faults": [{"rank", "phase", "act", "step", "attempt", "is_repeated", ...}]}. A fault without "step"
or "attempt" fits any. Each rank leaves its process id in `pids/<life>.<attempt>_<rank>`, and the moment just before
fault n in `fault_<n>.json`.

Phases: import, join, build, load, begin, data, read, agree, forward, backward, reduce, update, evaluate, save, write,
commit, log.
"""

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

from megascale.errors import ConfigError
from megascale.train import rank

PLAN = json.loads(Path(os.environ["MEGASCALE_TEST_PLAN"]).read_text())
FOLDER = Path(PLAN["folder"])
RANK = int(os.environ["RANK"])
INCARNATION = os.environ["MEGASCALE_INCARNATION"]
ATTEMPT = int(INCARNATION.rpartition(".")[2])
FOR_EVER_S = 10_000.0
CGROUP = Path("/sys/fs/cgroup/memory")
position = {"step": -1}


def reach(phase: str, step: int | None = None) -> str | None:
    """Commits the fault planned for this place, if there is one; returns its act when it returns."""
    step = position["step"] if step is None else step
    for number, fault in enumerate(PLAN["faults"]):
        fits = fault["rank"] == RANK and fault["phase"] == phase and fault.get("step", step) == step
        if fits and fault.get("attempt", ATTEMPT) == ATTEMPT and note(number, fault, step):
            commit_fault(fault)
            return fault["act"]
    return None


def note(number: int, fault: dict, step: int) -> bool:
    """Notes the moment; False when the fault has had its one time."""
    path = FOLDER / f"fault_{number}.json"
    if path.exists() and not fault.get("is_repeated"):
        return False
    draft = path.with_suffix(f".{os.getpid()}")
    about = {"unix_s": time.time(), "pid": os.getpid(), "rank": RANK, "incarnation": INCARNATION, "step": step}
    draft.write_text(json.dumps(about))
    draft.replace(path)
    return True


def commit_fault(fault: dict) -> None:
    """What happens there; `skip`, `other` and `slow` are done by the caller, or in `slow_down`."""
    acts = {
        "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "segv": lambda: os.kill(os.getpid(), signal.SIGSEGV),
        "abort": os.abort,
        "exit": lambda: os._exit(fault.get("code", 3)),
        "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
        "gil": lambda: ctypes.PyDLL(None).sleep(int(FOR_EVER_S)),  # PyDLL keeps the interpreter's lock in its calls
        "block": lambda: time.sleep(FOR_EVER_S),
        "pause": wait_to_go_on,
        "memory": fill_memory,
        "raise": fail,
        "refuse": refuse,
    }
    acts.get(fault["act"], lambda: None)()


def fail() -> None:
    raise RuntimeError("planned failure")


def refuse() -> None:
    raise ConfigError("planned refusal")


def wait_to_go_on() -> None:
    """Waits for the test, which does something just now."""
    deadline_s = time.monotonic() + 60
    while not (FOLDER / "go").exists() and time.monotonic() < deadline_s:
        time.sleep(0.02)


def fill_memory() -> None:
    """Takes memory until the kernel ends this process, in a cgroup of its own that its agent has had time to see."""
    group = CGROUP / f"megascale_test_{os.getpid()}"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(64 << 20))
    (group / "cgroup.procs").write_text(str(os.getpid()))
    time.sleep(1.5)
    held = []
    while True:
        held.append(b"x" * (4 << 20))


def wrap(owner, name: str, phase: str, *, after: bool = False, step_of=None) -> None:
    """Makes a function pass a place before, or after, its work; the act `skip` leaves the work out."""
    original = getattr(owner, name)

    def wrapped(*arguments, **options):
        step = step_of(*arguments) if step_of else None
        if not after and reach(phase, step) == "skip":
            return None
        result = original(*arguments, **options)
        if after:
            reach(phase, step)
        return result

    setattr(owner, name, wrapped)


def follow_steps(loop) -> None:
    """Notes how many steps are completed, at the head of each turn of the loop."""
    original = loop.evaluate_when_due

    def evaluate_when_due(run, state):
        position["step"] = state.step
        return original(run, state)

    loop.evaluate_when_due = evaluate_when_due


def slow_down(runner, engine) -> None:
    """Makes each step longer, and that of a straggler longer still."""
    work, step_s = runner.run, PLAN["step_s"]
    extra_s = sum(fault["seconds"] for fault in PLAN["faults"]
                  if fault["act"] == "slow" and fault["rank"] == RANK and fault.get("attempt", ATTEMPT) == ATTEMPT)
    if any(fault["act"] == "slow" for fault in PLAN["faults"]):
        def run(*arguments, **options):
            result = work(*arguments, **options)
            time.sleep(step_s + extra_s)
            return result

        runner.run = run
        return
    train_step = engine.train_step

    def slow_step(*arguments, **options):
        if not (FOLDER / "hurry").exists():
            time.sleep(step_s)
        return train_step(*arguments, **options)

    engine.train_step = slow_step


def call_another(mesh) -> None:
    """With the act `other`, a rank makes its own collective where the others agree on the step."""
    import torch
    import torch.distributed as dist

    original = mesh.Mesh.control_sum

    def control_sum(self, values, dtype=torch.int64):
        if reach("agree") == "other":
            dist.all_gather([torch.zeros(3) for _ in range(self.world_size)], torch.zeros(3), group=self.control_group)
        return original(self, values, dtype)

    mesh.Mesh.control_sum = control_sum


def wrap_all() -> None:
    """Puts places into the run; imports torch."""
    reach("import")
    from megascale.checkpoint import writer
    from megascale.data.loader import Loader
    from megascale.engine import zero01
    from megascale.engine.flat_zero import FlatZeroOptimizer
    from megascale.engine.micro_batches import MicroBatchRunner
    from megascale.observe.logger import Logger
    from megascale.parallel import mesh
    from megascale.train import loop, session, setup

    follow_steps(loop)
    call_another(mesh)
    slow_down(MicroBatchRunner, zero01.WholeGradientEngine)
    wrap(setup, "build_mesh", "join")
    wrap(setup, "build_run_engine", "build")
    wrap(setup, "load_pieces", "load")
    wrap(session, "train", "begin")
    wrap(loop, "wait_for_data", "data")
    rows = PLAN["rows_per_step"]
    wrap(Loader, "_make_step", "read", step_of=lambda self, row_numbers, places: int(row_numbers[0]) // rows)
    wrap(zero01.WholeGradientEngine, "train_step", "forward")
    wrap(MicroBatchRunner, "run", "backward", after=True)
    wrap(FlatZeroOptimizer, "reduce_gradients", "reduce")
    wrap(FlatZeroOptimizer, "update_lp_params", "update")
    wrap(loop, "evaluate", "evaluate")
    wrap(loop, "save", "save")
    wrap(writer, "write_part", "write")  # in the rank itself, with checkpoint.asynchronous: false
    wrap(writer, "commit", "commit")
    wrap(Logger, "log_train", "log")


def watch_then_wrap(original):
    """The start of a real rank, then the places: who watches sees this rank from its first moment too."""

    def start_watch(*arguments):
        result = original(*arguments)
        wrap_all()
        return result

    return start_watch


def main() -> None:
    pids = FOLDER / "pids"
    pids.mkdir(exist_ok=True)
    (pids / f"{INCARNATION}_{RANK}").write_text(str(os.getpid()))
    rank.start_watch = watch_then_wrap(rank.start_watch)
    rank.main(sys.argv[1:])


if __name__ == "__main__":
    main()
