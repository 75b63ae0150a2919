"""What to do next, as pure functions of what happened."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launcher.supervise.records import AttemptRecord, Outcome
from megascale.errors import EXIT_CRASH_LOOP, EXIT_OK, EXIT_RUN, EXIT_STOPPED, EXIT_USER
from megascale.parallel.heartbeat import COMPUTE_WINDOW, Beat

STRAGGLER_RATIO = 1.08
"""A rank that computes so many times as long as the median rank is named: well above noise, below the 10 % that cost a
whole cluster a tenth of its speed."""
SCATTERS = 5.0
"""So many times the median deviation from the median lies beyond chance (3.4 standard deviations)."""
STRAGGLER_STEPS = 5
"""Steps in a row for which a rank must be slow before it is named."""
REPLACED_RATIO = 3.0
"""A node this slow is as good as broken: it is replaced when there is a spare."""
FAULTS = (Outcome.FAILED, Outcome.HUNG, Outcome.NODE_LOST)


@dataclass(frozen=True)
class Restart:
    """Another attempt on these nodes."""

    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Requeue:
    """Back into the queue, without these nodes: name -> reason."""

    why: str
    without: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class End:
    """It is over."""

    code: int
    why: str


Action = Restart | Requeue | End


@dataclass(frozen=True)
class Situation:
    """What a decision rests on.

    Attributes:
        attempts: all so far, over all lives, the one that has just ended last.
        usable: nodes of this job that may train, in their order.
        excluded: nodes that may not: name -> reason.
        needed: nodes that the run needs.
        max_attempts: see `LaunchPlan.max_attempts_without_progress`.
        can_requeue: whether there is a queue to go back to.
        is_chained: whether another link of an array goes on.
        asked: why the run was asked to stop: `time limit`, `terminated`, `interrupt`; empty for not by a signal.
        is_replacing: whether it was stopped to go on without a slow node.
        job_state: what the scheduler says of the job, such as RUNNING or CANCELLED; empty where nobody says.
    """

    attempts: Sequence[AttemptRecord]
    usable: Sequence[str]
    excluded: Mapping[str, str]
    needed: int
    max_attempts: int
    can_requeue: bool
    is_chained: bool
    asked: str
    is_replacing: bool = False
    job_state: str = ""


def decide(situation: Situation) -> Action:
    """What follows the end of an attempt."""
    last = situation.attempts[-1]
    if last.outcome == Outcome.DONE:
        return End(EXIT_OK, "the run is complete")
    if last.outcome == Outcome.REFUSED:
        return End(EXIT_USER, f"refused: {last.reason}")
    if situation.asked or (last.outcome == Outcome.STOPPED and not situation.is_replacing):
        if last.outcome == Outcome.STOPPED:
            return _after_stop(situation, f"stopped at step {last.ended_step}", EXIT_STOPPED)
        return _after_stop(situation, f"asked to stop; {last.reason}", EXIT_RUN)
    fruitless = count_fruitless(situation.attempts)
    if fruitless >= situation.max_attempts:
        return End(EXIT_CRASH_LOOP, f"given up: {fruitless} attempts in a row ended without a new checkpoint, the last"
                                    f" because {last.reason}")
    return choose_nodes(situation)


def choose_nodes(situation: Situation) -> Action:
    """Starts on the first nodes that may train, or goes back to the queue for others."""
    if situation.asked:
        return _after_stop(situation, "asked to stop before it began", EXIT_STOPPED)
    if len(situation.usable) >= situation.needed:
        return Restart(tuple(situation.usable[: situation.needed]))
    lacking = f"{len(situation.usable)} of {situation.needed} nodes can train"
    if situation.can_requeue:
        return Requeue(lacking, dict(situation.excluded))
    if situation.is_chained:
        return End(EXIT_OK, f"{lacking}; the next link of the array goes on")
    return End(EXIT_RUN, f"{lacking}: {describe_excluded(situation.excluded)}")


def _after_stop(situation: Situation, saved: str, code: int) -> Action:
    if situation.job_state == "CANCELLED":
        return End(code, f"{saved} (cancelled); the same launch goes on from there")
    if situation.job_state not in ("", "RUNNING"):
        return End(EXIT_OK, f"{saved} (job {situation.job_state.lower()}); the scheduler has it")
    goes_on = situation.asked in ("time limit", "terminated")
    if goes_on and situation.is_chained:
        return End(EXIT_OK, f"{saved} ({situation.asked}); the next link of the array goes on")
    if goes_on and situation.can_requeue:
        return Requeue(f"{saved} ({situation.asked})")
    return End(code, f"{saved}, as asked ({situation.asked or 'by a signal or file'})")


def count_fruitless(attempts: Sequence[AttemptRecord]) -> int:
    """Attempts at the end of the list that failed and left no newer checkpoint than the one that they began with."""
    count = 0
    for attempt in reversed(attempts):
        if attempt.outcome not in FAULTS or attempt.ended_step > attempt.began_step:
            break
        count += 1
    return count


def describe_excluded(excluded: Mapping[str, str]) -> str:
    """Nodes that are left out, in words."""
    return "; ".join(f"{node}: {reason}" for node, reason in excluded.items()) or "no node is left out"


def find_stragglers(beats: Mapping[int, Beat]) -> dict[int, float]:
    """Ranks that compute longer than the others: rank -> how many times as long as the median rank.

    Measured over `COMPUTE_WINDOW` steps, without the time that a rank waits for others, and only beyond the scatter of
    all. Ranks that share a model with tensor or pipeline parallelism wait for each other within it, so there it
    is the whole replica that shows.

    Cost: two sorts, 10 ms for 10,000 ranks.
    """
    times = {rank: beat.compute_s for rank, beat in beats.items() if beat.compute_s > 0}
    if len(times) < 2 or len(times) < len(beats):
        return {}
    usual = statistics.median_low(times.values())  # of two ranks, the faster
    scatter = statistics.median_low(abs(value - usual) for value in times.values())
    limit = max(STRAGGLER_RATIO * usual, usual + SCATTERS * scatter)
    return {rank: compute_s / usual for rank, compute_s in times.items() if compute_s > limit}


class StragglerWatch:
    """Names a rank once it has been slow for some steps in a row."""

    def __init__(self) -> None:
        self._since: dict[int, int] = {}

    def note(self, beats: Mapping[int, Beat]) -> dict[int, float]:
        """The ranks that are stragglers by now, as `find_stragglers` gives them."""
        slow = {rank: ratio for rank, ratio in find_stragglers(beats).items()
                if beats[rank].steps_taken >= COMPUTE_WINDOW // 2}
        self._since = {rank: self._since.get(rank, beats[rank].steps_taken) for rank in slow}
        return {rank: ratio for rank, ratio in slow.items()
                if beats[rank].steps_taken - self._since[rank] >= STRAGGLER_STEPS}
