"""The first error of an attempt in a few lines: of all that ranks said when they went down, the cause, and whose."""

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.supervise.rank_dumps import describe_ranks
from megascale.errors import EXIT_OK, EXIT_PEER_LOST, EXIT_STOPPED, EXIT_USER, PEER_LOST_WORDS, redact
from megascale.observe.run_files import write_atomically

FIRST_ERROR_FILE = "first_error.txt"
TAIL_LINES = 25
MAX_OTHERS = 20
GIB = 1 << 30
_TRACEBACK_END = re.compile(r"^[\w.]*(?:Error|Exception|Interrupt|Exit|Warning)\b.*$", re.M)
_RANK_PREFIX = re.compile(r"^\[?rank ?\d+\]?:? ?", re.M)
_SIGNALS = {
    signal.SIGSEGV: "a crash in native code: the log's end has the Python stack when faulthandler could write one",
    signal.SIGBUS: "a mapped file was cut short, or /dev/shm is full: `df -h /dev/shm`",
    signal.SIGABRT: "native code gave up (assert, CUDA or NCCL error): its message is at the end of the log",
    signal.SIGFPE: "native code divided by zero",
    signal.SIGILL: "an instruction that this CPU doesn't have: a library was built for another machine",
    signal.SIGTERM: "somebody asked this process alone to end, before it could handle that",
    signal.SIGINT: "interrupted",
    signal.SIGXCPU: "its limit of CPU time (`ulimit -t`) was used up",
    signal.SIGXFSZ: "a file grew over the limit (`ulimit -f`)",
}


@dataclass(frozen=True)
class RankEnd:
    """How a rank ended.

    Attributes:
        code: exit code, negative for a signal.
        error: its message for the user, without `error: `; None when it had none.
        tail: end of its log.
        unix_s: when it was seen dead, by its node's clock.
        step: completed steps, -1 before that is known.
        phase: what it did.
        log: path of its whole log.
        oom: `{"limit_bytes", "peak_bytes"}` when the kernel killed for memory in its cgroup, values may be None.
    """

    rank: int
    node: str
    code: int
    error: str | None
    tail: str
    unix_s: float
    step: int
    phase: str
    log: str
    oom: dict[str, int | None] | None = None

    @property
    def is_follower(self) -> bool:
        """Whether it ended only because another rank was gone."""
        return self.code == EXIT_PEER_LOST or (
            self.code > 0 and self.error is None and any(word in last_line(self) for word in PEER_LOST_WORDS))

    @property
    def is_calm(self) -> bool:
        """Whether it ended without any error."""
        return self.code in (EXIT_OK, EXIT_STOPPED)


def first_cause(ends: Sequence[RankEnd]) -> RankEnd:
    """The end that knows why: the first for a reason of its own, else the first early end, else the first of all.

    When several ended alike, with a message for the user, they have agreed to, and the lowest rank, which acts for the
    others, has the details.
    """
    ordered = sorted(ends, key=lambda end: (end.unix_s, end.rank))
    own = [end for end in ordered if not end.is_follower and not end.is_calm]
    early = [end for end in ordered if end.is_calm]
    first = (own or early or ordered)[0]
    if first.error is None:
        return first
    return min((end for end in own or ordered if end.code == first.code and end.error is not None),
               key=lambda end: end.rank)


def merge_errors(ends: Sequence[RankEnd]) -> str:
    """All that ranks said at their end: the first cause in full, equal ones once, followers as one line.

    Args:
        ends: of the ranks that ended before they were told to, at least one.
    """
    cause = first_cause(ends)
    followers = [end for end in ends if end is not cause and end.is_follower]
    told = {cause.rank, *(end.rank for end in followers)}
    signature = _signature(cause)
    alike = [end for end in ends if end.rank not in told and end.code == cause.code and _signature(end) == signature]
    told |= {end.rank for end in alike}
    others = [end for end in ends if end.rank not in told]
    after = f"after step {cause.step}" if cause.step >= 0 else "before the first step"
    lines = [f"first error: rank {cause.rank} on {cause.node}, {after}, in phase {cause.phase}", explain(cause)]
    if alike:
        lines.append(f"(the same on {describe_ranks([end.rank for end in alike])})")
    lines += ["", f"what to do next: {advise(cause)}", f"full log: {cause.log}"]
    if cause.error is None and cause.tail.strip():
        lines += ["", f"end of its log ({Path(cause.log).name}):", *cause.tail.rstrip().splitlines()[-TAIL_LINES:]]
    if others:
        lines += ["", "other ends, probably its consequences:"]
        lines += [f"  {describe_ranks(ranks)}: {text}" for text, ranks in _group(others)[:MAX_OTHERS]]
    if followers:
        ranks = describe_ranks([end.rank for end in followers])
        lines += ["", f"{ranks} ended because the connection to another rank was gone; not the cause"]
    return redact("\n".join(lines)) + "\n"


def summarize(ends: Sequence[RankEnd]) -> str:
    """The first cause in one line: `rank 3 on node2: killed by SIGKILL: ...`."""
    cause = first_cause(ends)
    return redact(f"rank {cause.rank} on {cause.node}: {explain(cause).splitlines()[0]}")


def write_first_error(path: Path, ends: Sequence[RankEnd]) -> None:
    """Writes what `merge_errors` says."""
    write_atomically(path, merge_errors(ends).encode())


def explain(end: RankEnd) -> str:
    """Why a rank ended, as far as its message, its log, its code and the kernel tell."""
    if end.error is not None:
        return end.error
    if end.code == EXIT_OK:
        return "ended with exit code 0 while others still trained: something in it called exit"
    if end.code == EXIT_STOPPED:
        return "stopped and saved, as asked"
    if end.code < 0:
        return _explain_signal(end)
    last = last_line(end)
    return f"failed with exit code {end.code}" + (f": {last}" if last else "")


def advise(end: RankEnd) -> str:
    """What a person does about it."""
    if end.code == -signal.SIGKILL:
        return ("if the log names no reason, look at the node's kernel log (`dmesg -T | grep -i -e oom -e killed`);"
                " with too little memory use more nodes, a smaller train.micro_batch_size or more memory_per_node")
    if end.code == EXIT_USER:
        return "mend what the message names; another start would end the same"
    if end.error is not None:
        return "the message says it; the same command resumes from the newest checkpoint"
    return "look at the end of the log; the same command resumes from the newest checkpoint"


def last_line(end: RankEnd) -> str:
    """The line that its log ends with in effect: the last exception's, else the last one."""
    found = _TRACEBACK_END.findall(_RANK_PREFIX.sub("", end.tail))
    lines = end.tail.strip().splitlines()
    return (found[-1] if found else lines[-1] if lines else "").strip()


def _explain_signal(end: RankEnd) -> str:
    try:
        name = signal.Signals(-end.code).name
    except ValueError:
        name = f"signal {-end.code}"
    if end.code != -signal.SIGKILL:
        reason = _SIGNALS.get(-end.code, "see the end of the log")
    elif end.oom is not None:
        limit, peak = (end.oom.get(key) for key in ("limit_bytes", "peak_bytes"))
        numbers = [f"{name} {value / GIB:.2f} GiB" for name, value in (("limit", limit), ("peak", peak)) if value]
        reason = "out of memory, says the kernel" + (f": {', '.join(numbers)} (cgroup)" if numbers else "")
    else:
        reason = ("out of memory? The kernel counted no such kill in its cgroup, so a person, a scheduler or the whole"
                  " node's lack of memory are possible")
    return f"killed by {name}: {reason}"


def _signature(end: RankEnd) -> str:
    """What equal ends have in common: paths, ports and addresses of a message may differ from rank to rank."""
    return re.sub(r"\d+", "#", explain(end))


def _group(ends: Sequence[RankEnd]) -> list[tuple[str, list[int]]]:
    groups: dict[str, tuple[str, list[int]]] = {}
    for end in sorted(ends, key=lambda end: end.rank):
        text = explain(end).splitlines()[0]
        groups.setdefault(_signature(end), (text, []))[1].append(end.rank)
    return list(groups.values())
