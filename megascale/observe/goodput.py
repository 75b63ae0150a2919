"""Where the wall time of a run went, over all its sessions: what trained it, and what was spent on anything else.

    goodput/session_<began>_<token>.json   one for each session, written by its rank 0 while it trains
    goodput.json                           what they come to
"""

import json
import math
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

from megascale.observe.console import describe_goodput, say
from megascale.observe.metrics import Goodput
from megascale.observe.run_files import (
    GOODPUT_FILE,
    GOODPUT_FOLDER,
    read_json,
    read_metrics,
    write_atomically,
)
from megascale.parallel.heartbeat import Heartbeat, Phase

WRITE_INTERVAL_S = 10.0
"""What a hard kill can hide of the end of a session; beyond it, the time counts as down."""

COMPUTE_PHASES = (Phase.COMPUTE, Phase.AGREE)
STARTUP_PHASES = (Phase.START, Phase.JOIN, Phase.LOAD)


@dataclass(frozen=True)
class SessionTime:
    """What one session of a run has told of its time.

    Attributes:
        name: of its file, without the suffix.
        began_s: wall-clock time at which its process began.
        resumed_step: completed steps of the run when it began.
        reached_step: completed steps of the run when it told this.
        seconds: that it spent in each phase (`megascale.parallel.heartbeat.Phase`); they add up to its length.
    """

    name: str
    began_s: float
    resumed_step: int
    reached_step: int
    seconds: dict[str, float]

    @property
    def ended_s(self) -> float:
        """Wall-clock time of the last that is known of it."""
        return self.began_s + sum(self.seconds.values())


def derive_goodput(sessions: Sequence[SessionTime]) -> Goodput:
    """Sorts the wall time of a run, from the begin of its first session to the last known of its newest.

    A session's steps beyond the one that any later session resumed at are lost: they were taken again, or will be. They
    cost the mean of the session's steps. Where clocks of two machines let sessions overlap, nothing is down between.

    Args:
        sessions: at least one, in any order.
    """
    ordered = sorted(sessions, key=lambda session: session.began_s)
    kept = _count_kept(ordered)
    computed = [_spent(session, COMPUTE_PHASES) for session in ordered]
    taken = [session.reached_step - session.resumed_step for session in ordered]
    # A session that began a step and ended none has computed for nothing, unless it's still at it.
    shares = [own / steps if steps else 0.0 for own, steps in zip(kept, taken, strict=True)]
    shares[-1] = 1.0
    gaps = (max(0.0, later.began_s - earlier.ended_s) for earlier, later in pairwise(ordered))
    named = {
        "compute_s": sum(spent_s * share for spent_s, share in zip(computed, shares, strict=True)),
        "lost_s": sum(spent_s * (1 - share) for spent_s, share in zip(computed, shares, strict=True)),
        "data_s": _total(ordered, (Phase.DATA,)),
        "save_s": _total(ordered, (Phase.SAVE,)),
        "evaluate_s": _total(ordered, (Phase.EVALUATE,)),
        "startup_s": _total(ordered, STARTUP_PHASES),
        "down_s": sum(gaps),
    }
    whole_s = sum(sum(session.seconds.values()) for session in ordered) + named["down_s"]
    other_s = max(0.0, whole_s - sum(named.values()))
    wall_s = sum(named.values()) + other_s
    return Goodput(
        step=ordered[-1].reached_step, **named, other_s=other_s, wall_s=wall_s, steps_kept=sum(kept),
        steps_redone=sum(taken) - sum(kept), num_sessions=len(ordered),
        goodput_fraction=named["compute_s"] / wall_s if wall_s else 0.0, unix_s=ordered[-1].ended_s,
    )


def _count_kept(ordered: Sequence[SessionTime]) -> list[int]:
    """Of each session's steps, how many every later session has built on."""
    kept, limit = [], ordered[-1].reached_step
    for session in reversed(ordered):
        kept.append(max(0, min(session.reached_step, limit) - session.resumed_step))
        limit = min(limit, session.resumed_step)
    return kept[::-1]


def _spent(session: SessionTime, phases: Iterable[Phase]) -> float:
    return sum(session.seconds.get(phase, 0.0) for phase in phases)


def _total(sessions: Iterable[SessionTime], phases: Iterable[Phase]) -> float:
    return sum(_spent(session, phases) for session in sessions)


def extend(session: SessionTime, step: int, unix_s: float) -> SessionTime:
    """The session with a step that it logged after it last told of its time: until then it had computed, mostly."""
    if step <= session.reached_step or unix_s <= session.ended_s:
        return session
    computed_s = session.seconds.get(Phase.COMPUTE, 0.0) + unix_s - session.ended_s
    return replace(session, reached_step=step, seconds=session.seconds | {Phase.COMPUTE: computed_s})


def read_sessions(run_folder: Path) -> list[SessionTime]:
    """The sessions of a run in order, the newest up to the last step that it logged; files that are damaged left out.

    Cost: reads `metrics.jsonl` once.
    """
    paths = sorted((run_folder / GOODPUT_FOLDER).glob("session_*.json"))
    found = [session for path in paths if (session := _parse(path.stem, read_json(path)))]
    found.sort(key=lambda session: session.began_s)
    if found:
        for line in read_metrics(run_folder):
            if isinstance(line.get("unix_s"), int | float):
                found[-1] = extend(found[-1], line["step"], line["unix_s"])
    return found


def _parse(name: str, values: object) -> SessionTime | None:
    try:
        session = SessionTime(
            name, float(values["began_s"]), int(values["resumed_step"]), int(values["reached_step"]),
            {str(phase): float(spent_s) for phase, spent_s in values["seconds"].items()},
        )
    except (TypeError, KeyError, ValueError, AttributeError):
        return None
    times = (session.began_s, *session.seconds.values())
    is_possible = all(math.isfinite(time_s) and time_s >= 0 for time_s in times)
    return session if is_possible and 0 <= session.resumed_step <= session.reached_step else None


def write_session(run_folder: Path, session: SessionTime) -> None:
    """Replaces the file of a session."""
    fields = {name: value for name, value in asdict(session).items() if name != "name"}
    write_atomically(run_folder / GOODPUT_FOLDER / f"{session.name}.json", json.dumps(fields).encode())


def write_goodput(run_folder: Path, goodput: Goodput) -> None:
    """Writes `goodput.json`."""
    write_atomically(run_folder / GOODPUT_FILE, (json.dumps(asdict(goodput), indent=2) + "\n").encode())


class GoodputLog:
    """Keeps the account of this session's time; on rank 0 only.

    Raises:
        OSError: from any call: the run folder can't be written.
    """

    def __init__(self, run_folder: Path, pulse: Heartbeat, resumed_step: int):
        """Builds it before `metrics.jsonl` is rewound, which tells how far the session before really came.

        Args:
            pulse: knows how long this process was in each phase, from its start.
            resumed_step: completed steps of the run as this session begins.
        """
        self._folder, self._pulse, self._step = run_folder, pulse, resumed_step
        (run_folder / GOODPUT_FOLDER).mkdir(exist_ok=True)
        self._earlier = read_sessions(run_folder)
        if self._earlier:
            write_session(run_folder, self._earlier[-1])
        pulse.enter(pulse.phase)  # or the time in the present phase would be missing
        began_s = time.time() - sum(pulse.seconds.values())
        name = f"session_{int(began_s)}_{secrets.token_hex(4)}"
        self._session = SessionTime(name, began_s, resumed_step, resumed_step, dict(pulse.seconds))
        self._write()

    def note(self, step: int) -> None:
        """Takes the step just completed; cost: about a microsecond, and a small file each WRITE_INTERVAL_S."""
        self._step = step
        if time.monotonic() >= self._due_s:
            self._write()

    def measure(self) -> Goodput:
        """What the run has come to so far, all its sessions together."""
        self._write()
        return derive_goodput([*self._earlier, self._session])

    def close(self) -> None:
        """Ends the account, writes `goodput.json`, and tells people."""
        goodput = self.measure()
        write_goodput(self._folder, goodput)
        say(describe_goodput(goodput))

    def _write(self) -> None:
        self._due_s = time.monotonic() + WRITE_INTERVAL_S
        self._pulse.enter(self._pulse.phase)
        self._session = replace(self._session, reached_step=self._step, seconds=dict(self._pulse.seconds))
        write_session(self._folder, self._session)
