"""Whether a run hangs, and for whom it waits: from what each rank does, for how long, and from what all of them dumped.

One rule decides. Ranks work in step, so everyone waits for the rearmost; the run hangs when every rank there has been
longer in its phase than the phase may last. So ranks that wait for one whose storage is slow are excused as long as
that one is within its own limit, and slow storage is never called a hung step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from launcher.supervise.rank_dumps import Dumps, Mismatch, find_crossing, find_mismatch, find_roots, waits_for_others
from megascale.config.cluster import LimitsConfig
from megascale.parallel.heartbeat import Beat, Phase

FIRST_STEPS = 2
"""Steps of a process that take as long as compilation and warm-up do."""
STOPPED_STATE = "T"
"""Of /proc/PID/stat: stopped by a signal. A debugger's stop is a small `t`, and no fault."""
ENDED_STATES = ("Z", "X")
_ORDER = {phase: place for place, phase in enumerate((
    Phase.START, Phase.JOIN, Phase.LOAD, Phase.LOG, Phase.EVALUATE, Phase.SAVE, Phase.DATA, Phase.AGREE, Phase.COMPUTE,
    Phase.CLOSE,
))}
"""In which a rank goes through the phases between one completed step and the next."""


class HangKind(StrEnum):
    """What seems to be wrong; it decides what the report advises."""

    STOPPED = "stopped process"
    START = "start-up"
    LOAD = "load"
    DATA = "data"
    SAVE = "save"
    EVALUATE = "evaluation"
    LOG = "log"
    CLOSE = "close"
    DESYNC = "desync"
    STEP = "step"


_KIND_OF_PHASE = {
    Phase.START: HangKind.START, Phase.JOIN: HangKind.START, Phase.LOAD: HangKind.LOAD, Phase.DATA: HangKind.DATA,
    Phase.SAVE: HangKind.SAVE, Phase.EVALUATE: HangKind.EVALUATE, Phase.LOG: HangKind.LOG, Phase.CLOSE: HangKind.CLOSE,
    Phase.AGREE: HangKind.STEP, Phase.COMPUTE: HangKind.STEP,
}


@dataclass(frozen=True)
class RankView:
    """A rank as its agent sees it; times are CLOCK_MONOTONIC of its own node.

    Attributes:
        beat: what it wrote last; None before it wrote anything.
        state: letter of /proc/PID/stat, such as T stopped, D waiting for a disk, R running, S sleeping.
        now_s: when it was looked at.
        began_s: when it was first looked at.
        stopped_since_s: since when it has been seen in state T at every look; None when it isn't in it.
    """

    rank: int
    node: str
    beat: Beat | None
    state: str
    now_s: float
    began_s: float
    stopped_since_s: float | None = None

    @property
    def silent_s(self) -> float:
        """Seconds since it entered its phase or made progress in it."""
        return self.now_s - (self.beat.since_s if self.beat else self.began_s)

    @property
    def stopped_s(self) -> float:
        """Seconds that its process has been stopped."""
        return self.now_s - self.stopped_since_s if self.stopped_since_s is not None else 0.0

    @property
    def phase(self) -> Phase:
        """What it does; START before it wrote anything."""
        return self.beat.phase if self.beat else Phase.START

    @property
    def step(self) -> int:
        """Its completed steps, -1 before that is known."""
        return self.beat.step if self.beat else -1

    @property
    def position(self) -> tuple[int, int]:
        """How far it is: completed steps, then the phases after them."""
        return self.step, _ORDER[self.phase]


@dataclass(frozen=True)
class Hang:
    """A run that doesn't go on.

    Attributes:
        ranks: at fault, as far as it shows without dumps: the stopped ones, or the rearmost.
        is_certain: whether others are ahead of them or they are stopped; else every rank is as far as every other, and
            only dumps can tell.
        silent_s, limit_s: longest silence among `ranks`, and the limit that it broke.
    """

    kind: HangKind
    ranks: tuple[int, ...]
    is_certain: bool
    phase: Phase
    step: int
    silent_s: float
    limit_s: float


@dataclass(frozen=True)
class Blame:
    """Who holds the run up, after a look at the dumps.

    Attributes:
        ranks: at fault; where `is_known` is false, those that it may be.
        reason: how that shows, one sentence.
    """

    kind: HangKind
    ranks: tuple[int, ...]
    is_known: bool
    reason: str
    mismatch: Mismatch | None = None


def find_hang(views: Sequence[RankView], limits: LimitsConfig) -> Hang | None:
    """Whether the run hangs, and which ranks are silent.

    Args:
        views: of all ranks that have not ended, each from its last look.
    """
    views = [view for view in views if view.state not in ENDED_STATES]
    stopped = [view for view in views if view.stopped_s >= limits.frozen_s]
    if stopped:
        worst = max(stopped, key=lambda view: view.stopped_s)
        return Hang(HangKind.STOPPED, _ranks(stopped), True, worst.phase, worst.step, worst.stopped_s, limits.frozen_s)
    if not views:
        return None
    rear = min(view.position for view in views)
    behind = [view for view in views if view.position == rear]
    limit_s = limit_of(behind[0].phase, limits, step_limit_s(views, limits))
    if any(view.silent_s <= limit_s for view in behind):
        return None
    first = behind[0]
    return Hang(_KIND_OF_PHASE[first.phase], _ranks(behind), len(behind) < len(views) or len(views) == 1, first.phase,
                first.step, max(view.silent_s for view in behind), limit_s)


def step_limit_s(views: Sequence[RankView], limits: LimitsConfig) -> float:
    """How long a step may take: by the slowest step of any rank, once every rank has taken its first two."""
    beats = [view.beat for view in views if view.beat]
    if not beats or min(beat.steps_taken for beat in beats) < FIRST_STEPS:
        return limits.first_step_s
    return max(limits.step_floor_s, limits.step_factor * max(beat.slowest_step_s for beat in beats))


def limit_of(phase: Phase, limits: LimitsConfig, step_s: float) -> float:
    """How long a rank may stay in a phase without progress, in seconds."""
    own = {
        Phase.START: limits.start_s, Phase.JOIN: limits.start_s, Phase.LOAD: limits.load_s, Phase.DATA: limits.data_s,
        Phase.SAVE: limits.save_s, Phase.EVALUATE: limits.evaluate_s, Phase.CLOSE: limits.close_s,
    }
    return own.get(phase, step_s)


def find_culprit(hang: Hang, views: Sequence[RankView], dumps: Dumps) -> Blame:
    """Names the ranks at fault, or says that it can't be told.

    Of ranks that are equally far, those are at fault that others wait for and that wait for nobody: the collectives
    that each has entered tell it, and the stacks, where a wait isn't recorded (gloo's sends and receives aren't).
    """
    by_rank = {view.rank: view for view in views}
    stopped = tuple(rank for rank in sorted(by_rank) if by_rank[rank].state == STOPPED_STATE)
    if hang.kind == HangKind.STOPPED or stopped:
        return Blame(HangKind.STOPPED, stopped or hang.ranks, True, "its process is stopped (state T)")
    mismatch = find_mismatch(dumps.collectives) or find_crossing(dumps.collectives, frozenset(by_rank))
    if mismatch:
        return Blame(HangKind.DESYNC, mismatch.odd_ranks, len(mismatch.odd_ranks) < len(mismatch.calls),
                     mismatch.describe(), mismatch)
    behind = f"the only rank in phase {hang.phase} after step {hang.step}: all others are further"
    if len(hang.ranks) == 1:
        return Blame(hang.kind, hang.ranks, True, behind if len(views) > 1 else "the only rank")
    waiting = {rank for rank in hang.ranks if waits_for_others(dumps, rank)}
    if roots := find_roots(dumps, frozenset(by_rank)) & set(hang.ranks):
        return Blame(hang.kind, tuple(sorted(roots)), True,
                     "has not entered a collective that others wait in, and waits in none itself")
    idle = {rank for rank in hang.ranks if rank in dumps.stacks} - waiting
    if idle and waiting:
        return Blame(hang.kind, tuple(sorted(idle)), True, "waits for no other rank, while others wait")
    mute = set(hang.ranks) - set(dumps.collectives)
    if mute and mute != set(hang.ranks):
        return Blame(hang.kind, tuple(sorted(mute)), True,
                     "wrote no collectives when asked, as the others did: its interpreter doesn't run")
    if hang.is_certain:
        return Blame(hang.kind, hang.ranks, True,
                     f"in phase {hang.phase} after step {hang.step}, while all others are further")
    what = "every rank waits for others" if waiting else "no rank waits for another"
    return Blame(hang.kind, hang.ranks, False,
                 f"all ranks are in phase {hang.phase} after step {hang.step}, and {what}")


def _ranks(views: Sequence[RankView]) -> tuple[int, ...]:
    return tuple(sorted(view.rank for view in views))
