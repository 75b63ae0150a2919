"""Which nodes are bad, from the reports of all of them: pure functions. Nodes are in order, rank 0's first.

A node is only left out for what is surely its own: where two nodes differ and either could be the one at fault, the
first is believed for versions, and nobody is left out for a slow link.
"""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megascale.config.cluster import PreflightConfig


@dataclass(frozen=True)
class Floor:
    """A fact that must not be below a limit.

    Attributes:
        fact: name among the facts of a report.
        setting: the limit's field in `preflight` of the cluster's file.
        what: a noun for messages.
        advice: what to do.
    """

    fact: str
    setting: str
    what: str
    unit: str
    advice: str


FLOORS = (
    Floor("memory_gib", "min_memory_gib", "memory available", "GiB",
          "another job's processes? see `ps aux --sort -rss`"),
    Floor("run_disk_gib", "min_disk_gib", "disk space of the run folder", "GiB", "see `df -h {run_disk_path}`"),
    Floor("temporary_disk_gib", "min_disk_gib", "disk space for temporary files", "GiB",
          "see `df -h {temporary_disk_path}`, or set TMPDIR"),
    Floor("shm_gib", "min_shm_gib", "space in /dev/shm", "GiB", "another job's leftovers? see `ls -l /dev/shm`"),
    Floor("open_files", "min_open_files", "limit of open files", "",
          "`ulimit -n` in `setup` of the cluster's file, or limits.conf on the node"),
)


@dataclass(frozen=True)
class Link:
    """A test of the network from one node to another; without `gbps` they couldn't connect, for the reason `error`."""

    sender: str
    receiver: str
    gbps: float | None = None
    error: str = ""

    def is_bad(self, least_gbps: float) -> bool:
        """Whether it is slower than allowed, or doesn't work at all."""
        return self.gbps is None or self.gbps < least_gbps

    def __str__(self) -> str:
        measured = self.error if self.gbps is None else f"{self.gbps:g} Gbit/s"
        return f"{self.sender} to {self.receiver}: {measured}"


def judge(reports: Mapping[str, dict], settings: PreflightConfig) -> dict[str, list[str]]:
    """Reasons against each bad node; nodes without any aren't in it.

    Args:
        reports: of the nodes that reported, in the order of nodes, each with `facts`, `problems`, `wanted`, and
            `clock_s` and `clock_error_s` where its clock was read.
    """
    reasons = {node: judge_alone(report, settings) for node, report in reports.items()}
    alike = {node: report["facts"].get("versions") or {} for node, report in reports.items()}
    clocks = {node: (report["clock_s"], report["clock_error_s"]) for node, report in reports.items()
              if report.get("clock_s") is not None}
    for found in (judge_versions(alike), judge_clocks(clocks, settings.max_clock_skew_s),
                  judge_links(list_links(reports), list(reports), settings.min_bandwidth_gbps)[0]):
        for node, more in found.items():
            reasons[node] = reasons[node] + more
    return {node: found for node, found in reasons.items() if found}


def judge_alone(report: dict, settings: PreflightConfig) -> list[str]:
    """What is wrong with a node whatever the others are like."""
    facts, wanted = report["facts"], report["wanted"]
    reasons = list(report["problems"].values())
    for floor in FLOORS:
        value, least = facts.get(floor.fact), getattr(settings, floor.setting)
        if value is not None and 0 <= value < least:  # -1 is no limit, for open files
            unit = f" {floor.unit}" if floor.unit else ""
            advice = floor.advice.format_map(facts) if "{" in floor.advice else floor.advice
            reasons.append(f"{floor.what}: {value:g}{unit}, limit {least:g} (preflight.{floor.setting}): {advice}")
    for fact, kind in (("gpus", "visible"), ("torch_gpus", "usable by torch")):
        if facts.get(fact) is not None and facts[fact] < wanted["gpus"]:
            reasons.append(f"GPUs: {facts[fact]} {kind}, {wanted['gpus']} wanted: a GPU that fell off the bus, a driver"
                           " that isn't loaded, or fewer asked for than ranks need; see `nvidia-smi`")
            break
    if facts.get("cores") is not None and facts["cores"] < wanted["cores"]:
        reasons.append(f"cores: {facts['cores']} for this job, {wanted['cores']} wanted: ask for more with"
                       " `cpus_per_node` in the cluster's file; see `nproc`")
    return reasons


def judge_versions(versions: Mapping[str, Mapping[str, str]]) -> dict[str, list[str]]:
    """The odd ones out, for each thing that must be the same on all nodes; at a tie the first node is believed."""
    reasons: dict[str, list[str]] = {}
    for thing in dict.fromkeys(thing for own in versions.values() for thing in own):
        held = {node: own[thing] for node, own in versions.items() if thing in own}
        usual = Counter(held.values()).most_common(1)[0][0]  # of equal counts the one met first
        like = next(node for node, value in held.items() if value == usual)
        for node, value in held.items():
            if value != usual:
                what = "other code of megascale" if thing == "code" else f"another version of {thing}"
                reasons.setdefault(node, []).append(
                    f"{what}: {value}, {usual} on {like} and {Counter(held.values())[usual]} of {len(held)} nodes:"
                    " all need the same environment; a copy on a local disk that wasn't updated?"
                )
    return reasons


def judge_clocks(clocks: Mapping[str, tuple[float, float]], most_s: float) -> dict[str, list[str]]:
    """Nodes whose clock is off.

    Args:
        clocks: each node's clock relative to the controller's in seconds, and how wrong that may be.
        most_s: the largest difference allowed from the median of three nodes or more, or from the first of two.
    """
    if len(clocks) < 2:
        return {}
    offsets = [offset for offset, _ in clocks.values()]
    usual = statistics.median(offsets) if len(offsets) > 2 else offsets[0]
    whose = "the median of all nodes" if len(offsets) > 2 else f"{next(iter(clocks))}'s"
    return {
        node: [f"clock: {offset - usual:+.1f} s from {whose}, limit {most_s:g} (preflight.max_clock_skew_s): is its"
               " time service running? see `timedatectl`"]
        for node, (offset, error) in clocks.items() if abs(offset - usual) - error > most_s
    }


def list_links(reports: Mapping[str, dict]) -> list[Link]:
    """All tests of the network that were made."""
    return [Link(node, test["peer"], test.get("gbps"), test.get("error", ""))
            for node, report in reports.items() for test in report["facts"].get("bandwidth") or ()]


def judge_links(
    links: Sequence[Link], nodes: Sequence[str], least_gbps: float
) -> tuple[dict[str, list[str]], list[str]]:
    """Who is to blame for bad links, and what can't be blamed on anybody.

    A node is to blame when all its links are bad and a link between others is good. Of two nodes, the one that can't be
    reached while the other can is to blame, and the second where neither can; a link that is only slow leaves it open.

    Args:
        nodes: those that reported, in order: only of them it can be said whose fault it is.

    Returns:
        Reasons by node; notes for people about the links left over.
    """
    known = [link for link in links if link.sender in nodes and link.receiver in nodes]
    bad = [link for link in known if link.is_bad(least_gbps)]
    blamed: dict[str, list[str]] = {}
    for node in nodes:
        own = [link for link in known if node in (link.sender, link.receiver)]
        others = [link for link in known if link not in own]
        if own and all(link in bad for link in own) and any(link not in bad for link in others):
            blamed[node] = own
    if len(nodes) == 2 and not blamed:
        dead = [link.receiver for link in bad if link.gbps is None]
        if dead:
            blamed[dead[0] if len(dead) == 1 else nodes[1]] = [link for link in bad if link.gbps is None]
    reasons = {
        node: [f"network: {'; '.join(map(str, own))}, limit {least_gbps:g} Gbit/s (preflight.min_bandwidth_gbps): a"
               " loose cable, a firewall, or `interface` in the cluster's file names the wrong one"]
        for node, own in blamed.items()
    }
    left = [link for link in bad if link.sender not in blamed and link.receiver not in blamed]
    notes = [f"network: {link} (limit {least_gbps:g} Gbit/s); either of the two may be at fault, neither is left out"
             for link in left]
    return reasons, notes
