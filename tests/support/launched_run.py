"""Launched runs on virtual nodes of this machine, with planned faults, and what a test does to them from outside."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from launcher.submit.plan import derive_plan, dump_plan
from launcher.supervise.records import AttemptRecord, LaunchState, read_attempts, read_state
from megascale.config.cluster import ClusterConfig, LimitsConfig, PreflightConfig
from megascale.config.load import load_config
from tests.support.faulty_run import child_pids, is_alive, send_signal, wait_until
from tests.support.ranks import REPOSITORY
from tests.support.tiny_run import command_environment, megascale, write_config

FAULTY_RANK = "tests.fault.launched.rank"
CANARY = "canary-0f3b6c1d"
"""A secret in the environment of every launch; `LaunchedRun.places_of_secret` looks for it."""
MEMORY_GROUPS = Path("/sys/fs/cgroup/memory")
ROWS_PER_STEP = 8
LONGEST_S = 240.0
LIMITS = {"data_s": 10.0, "save_s": 10.0, "load_s": 60.0, "evaluate_s": 10.0, "start_s": 120.0, "first_step_s": 60.0}
"""Shorter limits than the defaults where those are minutes; those of a step and of frozen ranks are the defaults."""


@dataclass(frozen=True)
class Shape:
    """How a run is laid out over virtual nodes, and how long it is.

    Attributes:
        changes: of the tiny config, section -> values.
    """

    nodes: int = 2
    ranks_per_node: int = 2
    spares: int = 0
    changes: dict = field(default_factory=dict)

    @property
    def num_steps(self) -> int:
        """Steps of the run."""
        return self.changes.get("train", {}).get("max_steps", 12)


def prepare(folder: Path, corpus: Path, shape: Shape, limits: dict | None = None) -> Path:
    """Writes config and plan of a run `folder/run`; returns the plan's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = write_config(folder, corpus)
    config = yaml.safe_load(path.read_text())
    for section, values in shape.changes.items():
        config[section] = {**config.get(section, {}), **values}
    path.write_text(yaml.safe_dump(config))
    cluster = ClusterConfig(
        ranks_per_node=shape.ranks_per_node, limits=LimitsConfig(**LIMITS | (limits or {})),
        preflight=PreflightConfig(is_enabled=False),
    )
    plan, _ = derive_plan(load_config(path), cluster, shape.nodes, config_path=path, spares=shape.spares)
    (folder / "plan.json").write_text(dump_plan(plan))
    return folder / "plan.json"


def clean_run(folder: Path, corpus: Path, shape: Shape) -> Path:
    """The same run by `megascale train`, without a fault and without a launch; returns its run folder."""
    prepare(folder, corpus, shape)
    done = megascale("train", str(folder / "run.yaml"), "--nproc", str(shape.nodes * shape.ranks_per_node),
                     timeout_s=LONGEST_S + shape.num_steps)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


class LaunchedRun:
    """A launch with faulty ranks; `start` may be called again when the controller is gone.

    Args:
        faults: see `tests.fault.launched.rank`.
        program: module of the ranks.
        more: of the plan for the ranks.
    """

    def __init__(self, folder: Path, plan: Path, faults: list[dict], *, step_s: float = 0.05,
                 program: str = FAULTY_RANK, **more):
        self.folder, self._plan = folder, plan
        self.run_folder = plan.parent / "run"
        folder.mkdir(parents=True, exist_ok=True)
        content = {"folder": str(folder), "step_s": step_s, "rows_per_step": ROWS_PER_STEP, "faults": list(faults)}
        (folder / "faults.json").write_text(json.dumps(content | more))
        self._environment = command_environment(
            MEGASCALE_TEST_PLAN=str(folder / "faults.json"), MEGASCALE_TEST_RANKS=program, PYTHONPATH=str(REPOSITORY),
            WANDB_API_KEY=CANARY, SITE_SECRET_TOKEN=CANARY,
        )
        self.process: subprocess.Popen | None = None

    def start(self, output: Path | None = None) -> None:
        """Starts the controller, which starts the rest; what it says goes to `output`, by default `folder/output`."""
        with (output or self.folder / "output").open("a") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.fault.launched.job", str(self._plan)], env=self._environment,
                cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )

    def wait(self, timeout_s: float = LONGEST_S) -> int:
        """Waits for the controller's end; returns its exit code, negative for a signal."""
        return self.process.wait(timeout_s)

    def text(self) -> str:
        """What the controller has said so far."""
        return (self.folder / "output").read_text()

    def fault(self, number: int = 0) -> dict | None:
        """What is noted of a planned fault: unix_s, pid, rank, incarnation, step; None before it was committed."""
        path = self.folder / f"fault_{number}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def wait_for_fault(self, number: int = 0) -> dict:
        """Waits until a fault is committed."""
        wait_until(lambda: self.fault(number) or self.process.poll() is not None, self.text, LONGEST_S)
        assert self.fault(number), f"ended before fault {number}: {self.text()}"
        return self.fault(number)

    def go_on(self) -> None:
        """Ends all pauses."""
        (self.folder / "go").touch()

    def attempts(self) -> list[AttemptRecord]:
        """Of the attempts that have ended."""
        return read_attempts(self.run_folder)

    def places_of_secret(self) -> list[Path]:
        """Files of the run, and what the controller said, that hold the secret of the environment."""
        files = [path for path in (*self.run_folder.rglob("*"), self.folder / "output") if path.is_file()]
        return [path for path in files if CANARY.encode() in path.read_bytes()]

    def state(self) -> LaunchState | None:
        """Where the launch stands."""
        return read_state(self.run_folder)

    def agent(self, node: str) -> int:
        """The process of a node's agent.

        Raises:
            LookupError: it has none.
        """
        for pid in child_pids(self.process.pid):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"--node" in words and words[words.index(b"--node") + 1] == node.encode():
                return pid
        raise LookupError(f"no agent on {node}")

    def pids(self, node: str) -> list[int]:
        """The agent of a virtual node and its ranks."""
        agent = self.agent(node)
        return [agent, *child_pids(agent)]

    def signal_node(self, node: str, number: int = signal.SIGKILL) -> None:
        """Sends a signal to all processes of a virtual node at once."""
        for pid in self.pids(node):
            send_signal(pid, number)

    def rank_pids(self) -> dict[str, int]:
        """The ranks of all attempts so far: `<life>.<attempt>_<rank>` -> process id."""
        found = {}
        for path in list((self.folder / "pids").glob("*")):
            text = path.read_text()
            if text:
                found[path.name] = int(text)
        return found

    def is_down(self) -> bool:
        """Whether no rank of any attempt runs."""
        return not any(is_alive(pid) for pid in self.rank_pids().values())

    def close(self) -> None:
        """Leaves nothing running, whatever the test did."""
        if self.process is None:
            return
        agents = child_pids(self.process.pid) if self.process.poll() is None else []
        for pid in [self.process.pid, *agents, *self.rank_pids().values()]:
            if is_alive(pid) and is_ours(pid):
                send_signal(pid, signal.SIGKILL)
        self.process.wait()
        for pid in self.rank_pids().values():
            with contextlib.suppress(OSError):
                (MEMORY_GROUPS / f"megascale_test_{pid}").rmdir()


def is_ours(pid: int) -> bool:
    """Whether a process is a controller, agent or rank, and not another that has got its number since."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"launcher.supervise" in words or b"tests.fault.launched" in words


@contextlib.contextmanager
def launched_run(folder: Path, plan: Path, faults: list[dict], **options):
    """A launched run that has been started, ended with the block."""
    run = LaunchedRun(folder, plan, faults, **options)
    try:
        run.start()
        yield run
    finally:
        run.close()


def environment_of(pid: int) -> dict[str, str]:
    """What a process was started with."""
    pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return dict(os.fsdecode(pair).split("=", 1) for pair in pairs if b"=" in pair)
