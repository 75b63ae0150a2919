"""What ranks write when they are asked what they do: Python stacks, and the collectives of torch's flight recorder."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

STACKS = "stacks_{rank:05d}.txt"
COLLECTIVES = "collectives_{rank:05d}.json"
GROUPS_OF_ALL = ("default_pg", "control")
"""Groups of all ranks: torch's own, and the mesh's for small decisions."""
TOP_FRAMES = 4
"""Frames from the top of a stack among which torch's own stand when a thread waits in a collective."""
_WAITING_FRAME = re.compile(r'File ".*/torch/distributed/|File ".*/megascale/parallel/collectives\.py"')
_THREAD = re.compile(r"^(?:Current thread|Thread) .*$", re.M)
_MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Collective:
    """One entry of a flight recorder.

    Attributes:
        group: (name, description); the name tells groups of one kind apart, the same on all their ranks.
        number: of the collective in its group, from 1.
        call: such as `gloo:all_reduce`.
        sizes: of its inputs.
        is_over: whether it has come to its end.
        is_started: whether the device has begun it; gloo never says so.
        frame: innermost line of ours that called it; empty without recorded stacks.
    """

    group: tuple[str, str]
    number: int
    call: str
    sizes: str
    is_over: bool
    is_started: bool
    frame: str = ""

    def __str__(self) -> str:
        called = f", called at {self.frame}" if self.frame else ""
        return f"{self.call} {self.sizes}, number {self.number} of group {describe_group(self.group)}{called}"


@dataclass(frozen=True)
class Dumps:
    """What the ranks wrote, by rank; one that couldn't is missing.

    Attributes:
        collectives: entries, oldest first.
        stacks: text of all threads.
    """

    collectives: dict[int, list[Collective]] = field(default_factory=dict)
    stacks: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Mismatch:
    """Ranks that called different collectives where they should have met.

    Attributes:
        calls: what each rank called.
        odd_ranks: the minority; all, where there is none.
    """

    calls: dict[int, Collective]
    odd_ranks: tuple[int, ...]

    def describe(self) -> str:
        """Both sides in one sentence."""
        sides = defaultdict(list)
        for rank, call in self.calls.items():
            sides[str(call)].append(rank)
        return "; ".join(f"{describe_ranks(ranks)} called {call}" for call, ranks in sides.items())


def read_dumps(folder: Path, ranks: int) -> Dumps:
    """Reads what the ranks wrote into a folder; files that are missing or torn are left out."""
    dumps = Dumps()
    for rank in range(ranks):
        text = _read(folder / STACKS.format(rank=rank))
        if text and text.strip():
            dumps.stacks[rank] = text
        try:
            entries = json.loads(_read(folder / COLLECTIVES.format(rank=rank)) or "")["entries"]
            dumps.collectives[rank] = [_parse_entry(entry) for entry in entries if not entry.get("is_p2p")]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            continue
    return dumps


def find_waits(collectives: Mapping[int, list[Collective]]) -> dict[int, list[Collective]]:
    """In which collectives each rank waits: the earliest of each group that isn't over. Ranks without any are left out.

    On a GPU later ones may be in the queue behind it.
    """
    waits = {}
    for rank, entries in collectives.items():
        pending: dict[tuple[str, str], Collective] = {}
        for entry in sorted(entries, key=lambda entry: entry.number):
            if entry.is_over:
                pending.pop(entry.group, None)  # so are earlier ones, which nobody may have asked after
            else:
                pending.setdefault(entry.group, entry)
        if pending:
            waits[rank] = list(pending.values())
    return waits


def find_absent(wait: Collective, collectives: Mapping[int, list[Collective]], everyone: frozenset[int]) -> set[int]:
    """Ranks of the group that have not entered this collective, or whose device has not begun it where others' have.

    gloo doesn't tell who belongs to a group, so its ranks are those that used it before.
    """
    met = {rank: entry for rank, entries in collectives.items() for entry in entries
           if entry.group == wait.group and entry.number == wait.number}
    used = {rank for rank, entries in collectives.items() if any(entry.group == wait.group for entry in entries)}
    members = everyone if wait.group[1] in GROUPS_OF_ALL else used & everyone
    absent = set(members) - set(met)
    if not absent and any(entry.is_started for entry in met.values()):
        absent = {rank for rank, entry in met.items() if not entry.is_started and not entry.is_over}
    return absent


def find_roots(dumps: Dumps, everyone: frozenset[int]) -> set[int]:
    """Ranks that others wait for, and that wait for nobody: not in a collective, nor in a send or receive by its stack.

    A rank whose own device hasn't begun a collective that others' have waits for itself, which doesn't count.
    """
    pending = find_waits(dumps.collectives)
    waits_on = {
        rank: [find_absent(wait, dumps.collectives, everyone) for wait in waits] for rank, waits in pending.items()
    }
    awaited = {other for absents in waits_on.values() for absent in absents for other in absent}
    return {
        rank for rank in awaited
        if (all(rank in absent for absent in waits_on[rank]) if rank in pending else not waits_in_stack(dumps, rank))
    }


def find_mismatch(collectives: Mapping[int, list[Collective]]) -> Mismatch | None:
    """The first collective that some rank waits in and others met with another call, or with other sizes."""
    for wait in sorted((wait for waits in find_waits(collectives).values() for wait in waits),
                       key=lambda wait: (wait.number, wait.group)):
        calls = {rank: entry for rank, entries in sorted(collectives.items()) for entry in entries
                 if entry.group == wait.group and entry.number == wait.number}
        counts = Counter(_signature(call) for call in calls.values())
        if len(counts) > 1:
            (usual, most), (_, second) = counts.most_common(2)
            odd = tuple(rank for rank, call in calls.items() if most == second or _signature(call) != usual)
            return Mismatch(calls, odd)
    return None


def find_crossing(collectives: Mapping[int, list[Collective]], everyone: frozenset[int]) -> Mismatch | None:
    """Ranks that wait for each other in different collectives: one side has left one out, or called one too many."""
    sides: dict[tuple[tuple[str, str], int], dict[int, Collective]] = defaultdict(dict)
    for rank, waits in find_waits(collectives).items():
        for wait in waits:
            sides[wait.group, wait.number][rank] = wait
    absent = {key: find_absent(next(iter(side.values())), collectives, everyone) for key, side in sides.items()}
    for first, second in combinations(sorted(sides), 2):
        if absent[first] & set(sides[second]) and absent[second] & set(sides[first]):
            fewer, more = sorted((sides[first], sides[second]), key=len)
            return Mismatch(more | fewer, tuple(fewer) if len(fewer) < len(more) else tuple(sorted(more | fewer)))
    return None


def waits_for_others(dumps: Dumps, rank: int) -> bool:
    """Whether a rank waits in a collective, a send or a receive, as far as its dumps show."""
    return bool(find_waits({rank: dumps.collectives.get(rank, [])})) or waits_in_stack(dumps, rank)


def waits_in_stack(dumps: Dumps, rank: int) -> bool:
    """Whether a thread of a rank stands in torch's communication."""
    threads = _THREAD.split(dumps.stacks.get(rank, ""))[1:]
    return any(
        _WAITING_FRAME.search(line) for thread in threads for line in thread.strip().splitlines()[:TOP_FRAMES]
    )


def describe_group(group: tuple[str, str]) -> str:
    """A group's axes, and its number among groups."""
    name, description = group
    return f"{description or 'without a name'} ({name})"


def describe_ranks(ranks: list[int] | tuple[int, ...]) -> str:
    """Ranks in words, runs of them shortened: `rank 3`, `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}" if ranks else "no rank"


def _signature(call: Collective) -> tuple[str, str]:
    """What all ranks of a collective have in common; what each gives to a gather may differ in size."""
    return call.call, call.sizes if call.call.endswith("all_reduce") else ""


def _parse_entry(entry: dict) -> Collective:
    group = entry["process_group"]
    frames = [frame for frame in entry.get("frames") or () if "/megascale/" in str(frame.get("filename"))]
    return Collective(
        group=(str(group[0]), str(group[1])), number=int(entry["collective_seq_id"]), call=str(entry["profiling_name"]),
        sizes="x".join(str(size) for size in entry.get("input_sizes") or ()),
        is_over=bool(entry.get("retired")) or entry.get("state") == "completed",
        is_started=entry.get("state") == "started",
        frame=f"{frames[0]['filename']}:{frames[0].get('line')}" if frames else "",
    )


def _read(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_BYTES).decode("utf-8", "replace")
    except OSError:
        return None
