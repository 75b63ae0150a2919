"""The report of a hang: one file that says who holds the run up, who waits for what, and what to do next."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from launcher.supervise.hang import Blame, Hang, HangKind, RankView
from launcher.supervise.rank_dumps import STACKS, Collective, Dumps, describe_group, describe_ranks, find_waits
from megascale.observe.run_files import write_atomically
from megascale.parallel.heartbeat import Phase

REPORT_FILE = "hang_report.md"
ROWS_SHOWN = 64
MAX_WAITS = 16
MAX_STACKS = 16
STACK_LINES = 120
ADVICE = {
    HangKind.STOPPED: "The process got SIGSTOP or SIGTSTP, or its machine was suspended. Find out who did: a person, a"
    " debugger, a node's memory watchdog (`dmesg -T | tail`). The run itself is not at fault.",
    HangKind.START: "Imports or the rendezvous don't come to an end: look at the rank's log; on a cold or overloaded"
    " shared file system raise `limits.start_s`, or put the Python environment on a local disk.",
    HangKind.LOAD: "Look at the storage that checkpoints are read from (`megascale checkpoint verify RUN`); for a large"
    " model raise `limits.load_s`.",
    HangKind.DATA: "Storage of the corpus: try to read the shard that the stack names from that node (`ls`, `cat >"
    " /dev/null`); state D is a disk or network file system that doesn't answer. If it is only slow, raise"
    " `limits.data_s` or use `data.cache_folder`.",
    HangKind.SAVE: "Storage of checkpoints: see whether the node can write to the run folder, and its free space and"
    " quota. If it is only slow, raise `limits.save_s`.",
    HangKind.EVALUATE: "One batch of an evaluation took longer than `limits.evaluate_s`: see the stack.",
    HangKind.LOG: "Writing logs doesn't come to an end: see whether the node can write to the run folder.",
    HangKind.CLOSE: "The run is complete, but its logs don't end: see the stack; `limits.close_s` bounds it.",
    HangKind.DESYNC: "Ranks took different paths: code that depends on the rank, or nodes with different code, config"
    " or data. Compare the call sites below. A restart alone will not mend it.",
    HangKind.STEP: "If the stack stands in a GPU call, look at that node's GPU and network (`nvidia-smi`, `dmesg -T |"
    " grep -i xid`, link counters); in Python code, at that line. The same node twice: leave it out with `--exclude`.",
}
_ADDRESSES = re.compile(r"0x[0-9a-f]+")


def write_hang_report(
    path: Path, hang: Hang, blame: Blame, views: Sequence[RankView], dumps: Dumps, now: str = ""
) -> None:
    """Writes the report, whole or not at all.

    Args:
        now: time of the detection, for people.
    """
    parts = [
        _head(hang, blame, views, dumps, now), _rank_table(blame, views, dumps), _collective_table(views, dumps),
        _stacks(blame, views, dumps),
    ]
    write_atomically(path, ("\n".join(parts).rstrip() + "\n").encode())


def summarize_hang(hang: Hang, blame: Blame, views: Sequence[RankView]) -> str:
    """The hang in one line: who, where, since when, doing what."""
    nodes = sorted({view.node for view in views if view.rank in blame.ranks})
    who = f"{describe_ranks(blame.ranks)} on {', '.join(nodes)}"
    doing = f"{hang.phase} after step {hang.step}" if hang.step >= 0 else f"{hang.phase}"
    known = who if blame.is_known else f"nobody can be named for certain ({who} may be at fault)"
    stopped = "stopped" if hang.kind == HangKind.STOPPED else "silent"
    return f"{blame.kind}: {known}; {stopped} for {hang.silent_s:.0f} s in {doing}, limit {hang.limit_s:.0f} s"


def _head(hang: Hang, blame: Blame, views: Sequence[RankView], dumps: Dumps, now: str) -> str:
    by_rank = {view.rank: view for view in views}
    lines = ["# Hang report", "", f"**{summarize_hang(hang, blame, views)}**", "", f"- how it shows: {blame.reason}"]
    if now:
        lines.append(f"- found: {now}")
    rows = sorted({by_rank[rank].beat.first_row for rank in blame.ranks if rank in by_rank and by_rank[rank].beat})
    if rows and rows[-1] >= 0:
        lines.append(f"- data: the step begins with row {rows[-1]} of the stream")
    saved = max((view.beat.saved_step for view in views if view.beat), default=-1)
    lines.append(f"- newest safe checkpoint: {f'step {saved}' if saved >= 0 else 'none in this attempt'}")
    lines += [f"- {describe_ranks(ranks)} wait{'s' if len(ranks) == 1 else ''} in {call}"
              for call, ranks in _waits(dumps, set(blame.ranks) if blame.is_known else set())]
    disk = [rank for rank in blame.ranks if rank in by_rank and by_rank[rank].state == "D"]
    if disk:
        lines.append(f"- {describe_ranks(disk)}: in state D, the kernel waits for a disk or a network file system")
    return "\n".join([*lines, "", f"What to do next: {ADVICE[blame.kind]}", ""])


def _waits(dumps: Dumps, without: set[int]) -> list[tuple[str, list[int]]]:
    sides: dict[str, list[int]] = defaultdict(list)
    for rank, waits in sorted(find_waits(dumps.collectives).items()):
        for wait in waits if rank not in without else ():
            sides[str(wait)].append(rank)
    return list(sides.items())[:MAX_WAITS]


def _rank_table(blame: Blame, views: Sequence[RankView], dumps: Dumps) -> str:
    """All ranks, or of many those that stand out, and how many are like each other."""
    waits = find_waits(dumps.collectives)
    kinds = Counter(_kind(view) for view in views)
    usual = kinds.most_common(1)[0][0] if kinds else None
    is_short = len(views) <= ROWS_SHOWN
    shown = [view for view in sorted(views, key=lambda view: view.rank)
             if is_short or view.rank in blame.ranks or _kind(view) != usual][:ROWS_SHOWN]
    lines = ["## Ranks", ""]
    if not is_short:
        lines += [f"{len(views)} ranks: " + "; ".join(
            f"{count} in {phase} after step {step}, state {state}"
            for (phase, step, state), count in kinds.most_common(8)
        ) + ". Those that stand out:", ""]
    lines += ["| rank | node | phase | after step | silent, s | state | pid | waits in |", "|" + "---|" * 8]
    for view in shown:
        calls = ", ".join(f"{describe_group(wait.group)} no. {wait.number} {wait.call}"
                          for wait in waits.get(view.rank, ())) or "-"
        mark = " **at fault**" if blame.is_known and view.rank in blame.ranks else ""
        lines.append(f"| {view.rank}{mark} | {view.node} | {view.phase} | {view.step} | {view.silent_s:.1f} |"
                     f" {view.state} | {view.beat.pid if view.beat else '-'} | {calls} |")
    return "\n".join([*lines, ""])


def _kind(view: RankView) -> tuple[Phase, int, str]:
    return view.phase, view.step, "T" if view.state == "T" else "D" if view.state == "D" else "R/S"


def _collective_table(views: Sequence[RankView], dumps: Dumps) -> str:
    """The last collective of each group, with the ranks for which it is that."""
    last: dict[tuple[str, str], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, entries in sorted(dumps.collectives.items()):
        newest: dict[tuple[str, str], Collective] = {}
        for entry in entries:
            if entry.group not in newest or entry.number > newest[entry.group].number:
                newest[entry.group] = entry
        for group, entry in newest.items():
            end = "over" if entry.is_over else "under way"
            last[group][f"no. {entry.number} {entry.call} {entry.sizes} | {end}"].append(rank)
    lines = ["## Last collective of each group", ""]
    if not last:
        return "\n".join([*lines, "No rank could write what its flight recorder holds.", ""])
    lines += ["| group | collective | state | ranks |", "|---|---|---|---|"]
    lines += [f"| {describe_group(group)} | {text} | {describe_ranks(ranks)} |"
              for group, sides in sorted(last.items())[: 4 * ROWS_SHOWN] for text, ranks in sides.items()]
    missing = [view.rank for view in views if view.rank not in dumps.collectives]
    if missing:
        lines += ["", f"Without a dump of collectives: {describe_ranks(missing)}."]
    return "\n".join([*lines, ""])


def _stacks(blame: Blame, views: Sequence[RankView], dumps: Dumps) -> str:
    """The stacks, those at fault first; equal ones once."""
    alike: dict[str, list[int]] = defaultdict(list)
    texts = {}
    for rank, text in sorted(dumps.stacks.items(), key=lambda item: (item[0] not in blame.ranks, item[0])):
        key = _ADDRESSES.sub("", text)
        alike[key].append(rank)
        texts.setdefault(key, text)
    lines = ["## Python stacks", ""]
    for number, (key, ranks) in enumerate(alike.items()):
        if number == MAX_STACKS:
            lines += [f"{len(alike) - MAX_STACKS} more kinds of stacks are in the files stacks_*.txt.", ""]
            break
        stack = texts[key].strip().splitlines()
        more = [f"... {len(stack) - STACK_LINES} more lines in {STACKS.format(rank=ranks[0])}"]
        lines += [f"### {describe_ranks(ranks).capitalize()}" + (" (the same)" if len(ranks) > 1 else ""), "", "```",
                  *stack[:STACK_LINES], *(more if len(stack) > STACK_LINES else []), "```", ""]
    missing = [view.rank for view in views if view.rank not in dumps.stacks]
    if missing:
        lines.append(f"No stacks were written by {describe_ranks(missing)}.")
    return "\n".join(lines)
