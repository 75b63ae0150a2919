"""Runs a launched run with its faults and scores from outside how it was survived."""

import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from launcher.supervise.records import AttemptRecord, Outcome
from tests.support.faulty_run import is_alive
from tests.support.launched_run import LaunchedRun, Shape, prepare
from tests.support.tiny_run import curve

LOOK_S = 0.05


@dataclass(frozen=True)
class Case:
    """A fault and what must follow.

    Attributes:
        rows: of the list of faults that megascale must survive.
        faults: see `tests.fault.launched.rank`.
        culprit: that the first failed attempt's record must name; empty for a case in which nobody is at fault.
        said: pattern that must be found in the record's reason, the first error or the hang report.
        heard: pattern that the controller must have said.
        act: done from outside once the run has been started; it waits for fault 0 itself.
        is_started_again: whether the same command is given once more, after the controller's end.
        exit_code, num_attempts: as they must be at the end; no attempts means that any number will do.
    """

    name: str
    rows: tuple[int, ...]
    faults: tuple[dict, ...] = ()
    culprit: str = ""
    said: str = ""
    heard: str = ""
    act: Callable[[LaunchedRun], None] | None = None
    shape: Shape = field(default_factory=Shape)
    limits: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    is_started_again: bool = False
    exit_code: int = 0
    num_attempts: int | None = 2
    is_completed: bool = True


@dataclass(frozen=True)
class Score:
    """How a case went; times in seconds, None where they don't apply.

    Attributes:
        detected_s: from the fault to the controller's word that the attempt has failed.
        down_s: from the fault to the end of the last rank of the attempt.
        recovered_s: from the fault to the first step of the next attempt.
        steps_lost: steps taken at the fault that the next attempt had to take again.
        is_named: whether culprit and reason are the right ones; None where nobody is at fault.
        is_curve_equal: whether curve, weights, moments and ledger equal the clean run's; None when it wasn't to end.
    """

    name: str
    rows: tuple[int, ...]
    detected_s: float | None
    down_s: float | None
    recovered_s: float | None
    steps_lost: int | None
    is_named: bool | None
    is_curve_equal: bool | None
    exit_code: int
    attempts: int
    problems: tuple[str, ...]


class Deaths(threading.Thread):
    """Notes when each rank of a run was first seen dead."""

    def __init__(self, run: LaunchedRun):
        super().__init__(daemon=True)
        self._run, self._is_over = run, threading.Event()
        self.seen_s: dict[str, float] = {}

    def run(self) -> None:
        """Looks until `end`."""
        while not self._is_over.wait(LOOK_S):
            self._look()

    def end(self) -> None:
        """Looks once more, and ends."""
        self._is_over.set()
        self.join()
        self._look()

    def down_s(self, incarnation: str) -> float | None:
        """Wall-clock time at which the last rank of an attempt was gone; None while one runs."""
        ranks = [name for name in self._run.rank_pids() if name.rpartition("_")[0] == incarnation]
        moments = [self.seen_s.get(name) for name in ranks]
        return max(moments) if moments and None not in moments else None

    def _look(self) -> None:
        for name, pid in self._run.rank_pids().items():
            if name not in self.seen_s and not is_alive(pid):
                self.seen_s[name] = time.time()


def run_case(case: Case, folder: Path, corpus: Path, clean: Path | None) -> Score:
    """Carries a case out.

    Args:
        clean: run folder of the same run without a fault; None where the run isn't to end.

    Raises:
        AssertionError: the case couldn't be carried out, as when the fault was never reached.
    """
    plan = prepare(folder, corpus, case.shape, case.limits)
    run = LaunchedRun(folder / "faults", plan, list(case.faults), **case.options)
    deaths = Deaths(run)
    deaths.start()
    try:
        run.start()
        if case.act is not None:
            case.act(run)
        code = run.wait()
        if case.is_started_again:
            run.start()
            code = run.wait()
    finally:
        run.close()
        deaths.end()
    return judge(case, run, deaths, code, clean)


def judge(case: Case, run: LaunchedRun, deaths: Deaths, code: int, clean: Path | None) -> Score:
    """What came of it."""
    records, fault = run.attempts(), run.fault()
    failed = next((r for r in records if r.outcome not in (Outcome.DONE, Outcome.STOPPED)), None)
    detected_s = down_s = recovered_s = steps_lost = None
    if fault and failed and case.culprit:
        detected_s = failed.ended_s - (failed.down_s or 0.0) - fault["unix_s"]
    down_at_s = deaths.down_s(fault["incarnation"]) if fault else None
    if fault and down_at_s and (case.culprit or case.is_started_again):
        down_s = down_at_s - fault["unix_s"]
    following = [r for r in records if fault and r.began_s > fault["unix_s"] and r.first_step_s]
    if following and down_s is not None:
        recovered_s = following[0].first_step_s - fault["unix_s"]
        steps_lost = max(0, fault["step"]) - resumed_at(run, following[0])
    is_named = is_well_named(case, run, failed) if case.culprit else None
    if case.heard:
        is_named = is_named is not False and re.search(case.heard, run.text()) is not None
    differences = compare(run.run_folder, clean, case.shape.num_steps) if clean and case.is_completed else []
    problems = [*differences, *(f"{path} holds a secret of the environment" for path in run.places_of_secret())]
    if code != case.exit_code:
        problems.append(f"exit code {code}, expected {case.exit_code}")
    if case.num_attempts is not None and len(records) != case.num_attempts:
        problems.append(f"{len(records)} attempts, expected {case.num_attempts}")
    if is_named is False:
        said = f"{failed.culprit}: {failed.reason}" if failed else "no attempt failed"
        problems.append(f"expected {case.culprit!r} {case.said!r} {case.heard!r}, got {said!r}")
    return Score(case.name, case.rows, detected_s, down_s, recovered_s, steps_lost, is_named,
                 not differences if case.is_completed else None, code, len(records), tuple(problems))


def resumed_at(run: LaunchedRun, record: AttemptRecord) -> int:
    """The step that an attempt began with, by its own word; 0 for the beginning."""
    log = run.run_folder / "logs" / record.life / f"attempt_{record.attempt}" / "rank_00000.log"
    found = re.search(r"^resuming from .* at step (\d+)$", log.read_text(errors="replace"), re.M)
    return int(found[1]) if found else 0


def is_well_named(case: Case, run: LaunchedRun, failed: AttemptRecord | None) -> bool:
    """Whether the record names the culprit alone, and record or report say what it did."""
    if failed is None:
        return False
    folder = run.run_folder / "logs" / failed.life / f"attempt_{failed.attempt}"
    texts = [failed.reason, *(path.read_text(errors="replace")
                              for name in ("first_error.txt", "hang_report.md") if (path := folder / name).exists())]
    return failed.culprit == case.culprit and re.search(case.said, "\n".join(texts)) is not None


def compare(run_folder: Path, clean: Path, num_steps: int) -> list[str]:
    """What differs from the clean run in curve, last weights and moments, and state with its ledger."""
    try:
        differences = [] if curve(run_folder) == curve(clean) else ["the curve differs"]
        name = f"checkpoints/step_{num_steps:08d}"
        for path in sorted((clean / name).glob("*.safetensors")):
            if (run_folder / name / path.name).read_bytes() != path.read_bytes():
                differences.append(f"{path.name} differs")
        states = [json.loads((folder / name / "index.json").read_text())["state"] | {"wandb_run_id": None}
                  for folder in (run_folder, clean)]
        return differences if states[0] == states[1] else [*differences, "state or ledger differ"]
    except OSError as error:
        return [f"no end to compare: {error}"]
