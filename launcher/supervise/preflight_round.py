"""One pre-flight over all nodes of a job, seen from the controller: who is asked what, and when it is over.

A state machine without sockets, files or processes: the caller brings lines and the time, and sends what it is given.
"""

import json
import math
import secrets
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from launcher.local import MAX_RANKS_PER_CORE
from launcher.submit.plan import LaunchPlan
from launcher.supervise.preflight_judge import judge, judge_links, list_links
from launcher.supervise.preflight_network import TOKEN_BYTES
from launcher.supervise.records import LOGS_FOLDER
from megascale.config.cluster import PreflightConfig
from megascale.observe.run_files import write_atomically

TOKEN_FILE = "preflight.token"
LISTEN_FRACTION = 1 / 3
"""Part of the limit after which the network is tested among those that listen by then."""
PEER_STEPS = (1, 2)
"""Each node sends to the next and the one after it: with three nodes or more, two links lead away from each."""


@dataclass(frozen=True)
class Needs:
    """What a run needs of each node.

    Attributes:
        gpus: 0 on the CPU.
        cores: that ranks share.
        run_folder: absolute path, on every node the same.
        token_file: in the run folder, written by the controller.
        token: its content.
        data_folders: that ranks read from.
    """

    gpus: int
    cores: int
    run_folder: str
    token_file: str
    token: str
    data_folders: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """How a pre-flight ended.

    Attributes:
        bad: why, for each node that must not train.
        good: the other nodes, in order.
        reports: what the nodes measured, by name.
        seconds: from the first request to the end.
        notes: for people: what is wrong but nobody's in particular.
    """

    bad: dict[str, tuple[str, ...]]
    good: list[str]
    reports: dict[str, dict]
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def is_common(self) -> bool:
        """Whether all of several nodes are bad: then it is the call, the file system or the network that is, and no
        node should be remembered as bad."""
        return len(self.bad) > 1 and not self.good


@dataclass
class _Node:
    """What is known of a node so far; times of the caller's clock."""

    host: str
    text: str = ""
    address: dict | None = None
    has_answered: bool = False
    asked_s: float | None = None
    clock: tuple[float, float] | None = None
    report: dict | None = None
    failure: str = ""

    @property
    def is_over(self) -> bool:
        return self.report is not None or bool(self.failure)


@dataclass
class PreflightRound:
    """One pre-flight. `begin`, then everything that comes from the nodes, until `is_over`; then `verdict`.

    Attributes:
        nodes: address by name, in order; rank 0's node first.
        needs: see `build_needs`.
        send: takes a node's name and a message for its agent: `{"type": "preflight", "request": JSON}` or
            `{"type": "preflight_input", "line": JSON}`.
        now: a clock in seconds that never goes back.
    """

    nodes: Mapping[str, str]
    settings: PreflightConfig
    needs: Needs
    send: Callable[[str, dict], None]
    now: Callable[[], float]
    _known: dict[str, _Node] = field(init=False)
    _began_s: float = field(init=False, default=0.0)
    _ended_s: float | None = field(init=False, default=None)
    _is_paired: bool = field(init=False, default=False)
    _network_token: str = field(init=False, default_factory=lambda: secrets.token_hex(TOKEN_BYTES // 2))

    def __post_init__(self) -> None:
        self._known = {name: _Node(host) for name, host in self.nodes.items()}

    def begin(self) -> None:
        """Asks all nodes."""
        self._began_s = self.now()
        for name, node in self._known.items():
            request = build_request(self.needs, self.settings, name, node.host, self._network_token)
            self.send(name, {"type": "preflight", "request": json.dumps(request)})

    def on_text(self, name: str, text: str) -> None:
        """Some of what a node's program printed, cut anywhere."""
        if name not in self._known:
            return
        *lines, self._known[name].text = (self._known[name].text + text).split("\n")
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:  # a library of the node may print what it likes
                continue
            if isinstance(message, dict):
                self.on_line(name, message)

    def on_line(self, name: str, line: dict) -> None:
        """One message of a node's program."""
        node = self._known.get(name)
        if node is None or self._ended_s is not None:
            return
        if "listen" in line:
            node.has_answered, node.address, node.asked_s = True, line["listen"], self.now()
            self._tell(name, {"time": True})
        elif "clock" in line and node.asked_s is not None:
            now_s = self.now()
            # The node read its clock somewhere between question and answer.
            node.clock = (line["clock"] - (node.asked_s + now_s) / 2, (now_s - node.asked_s) / 2)
        elif "report" in line:
            node.report = line["report"]
        self._advance()

    def on_end(self, name: str, code: int) -> None:
        """A node's program has ended; without a report that makes the node bad."""
        self._fail(name, f"its pre-flight ended with exit code {code} and without a report; its agent's log says why:"
                         " another Python, or an environment that is broken there?")

    def on_lost(self, name: str) -> None:
        """A node's agent is gone; even one that reported well can't train."""
        if name in self._known:
            self._known[name].report = None
        self._fail(name, "its agent was lost during the pre-flight: the node is down, or cut off")

    def is_over(self) -> bool:
        """Whether all nodes have reported, or the limit has passed. To be asked a few times a second: time is noticed
        here."""
        self._advance()
        return self._ended_s is not None

    def verdict(self) -> Verdict:
        """Who may train. Call it when the round is over."""
        reports = {}
        for name, node in self._known.items():
            if node.report is not None:
                offset, error = node.clock or (None, None)
                reports[name] = node.report | {"clock_s": offset, "clock_error_s": error}
        _round_clocks(reports)
        bad = {name: (self._describe_silence(node),) for name, node in self._known.items() if name not in reports}
        bad |= {name: tuple(reasons) for name, reasons in judge(reports, self.settings).items()}
        ended_s = self.now() if self._ended_s is None else self._ended_s
        _, notes = judge_links(list_links(reports), list(reports), self.settings.min_bandwidth_gbps)
        return Verdict(
            {name: bad[name] for name in self._known if name in bad}, [name for name in self._known if name not in bad],
            reports, round(ended_s - self._began_s, 3), tuple(notes),
        )

    def _describe_silence(self, node: _Node) -> str:
        if node.failure:
            return node.failure
        where = "began, but didn't report" if node.has_answered else "said nothing"
        return (f"{where} within {self.settings.limit_s:g} s (preflight.limit_s): a hung file system below its Python,"
                " or a node that is overloaded; can you log in there?")

    def _fail(self, name: str, reason: str) -> None:
        node = self._known.get(name)
        if node is None or self._ended_s is not None or node.is_over:
            return
        node.failure = reason
        self._advance()

    def _advance(self) -> None:
        """Takes the steps that are due."""
        if self._ended_s is not None:
            return
        passed_s = self.now() - self._began_s
        waiting = [node for node in self._known.values() if not node.has_answered and not node.is_over]
        if not self._is_paired and (not waiting or passed_s > LISTEN_FRACTION * self.settings.limit_s):
            self._is_paired = True
            self._pair()
        if all(node.is_over for node in self._known.values()) or passed_s >= self.settings.limit_s:
            self._ended_s = self.now()
            for name, node in self._known.items():
                if not node.failure:
                    self._tell(name, {"done": True})

    def _pair(self) -> None:
        listening = [name for name, node in self._known.items() if node.address and not node.failure]
        for name, peers in pair_nodes(listening).items():
            self._tell(name, {"peers": [{"node": peer} | self._known[peer].address for peer in peers]})
        for name in self._known.keys() - set(listening):
            if self._known[name].has_answered:
                self._tell(name, {"peers": []})

    def _tell(self, name: str, line: dict) -> None:
        self.send(name, {"type": "preflight_input", "line": json.dumps(line)})


def pair_nodes(nodes: list[str]) -> dict[str, list[str]]:
    """Whom each node sends to: the next one in the circle, and the one after that where there are three or more."""
    count = len(nodes)
    steps = [step for step in PEER_STEPS if step < count]
    return {node: [nodes[(index + step) % count] for step in steps] for index, node in enumerate(nodes)}


def build_needs(plan: LaunchPlan, life: str) -> Needs:
    """What a run needs of its nodes; writes the token by which they know the run folder.

    Raises:
        OSError: the run folder can't be written by the controller.
    """
    token_file = plan.folder / LOGS_FOLDER / life / TOKEN_FILE
    token_file.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(16)
    write_atomically(token_file, token.encode())
    gpus = plan.ranks_per_node if plan.cluster.gpus_per_node else 0
    cores = plan.ranks_per_node if gpus else math.ceil(plan.ranks_per_node / MAX_RANKS_PER_CORE)
    return Needs(gpus, cores, plan.run_folder, str(token_file), token, plan.data_folders)


def build_request(needs: Needs, settings: PreflightConfig, node: str, host: str, network_token: str) -> dict:
    """What the program on a node is asked, as `launcher.supervise.preflight` takes it."""
    return asdict(needs) | {"node": node, "host": host, "limit_s": settings.limit_s, "network_token": network_token}


def write_report(path: Path, verdict: Verdict) -> None:
    """Writes `preflight.json`: the verdict with all that was measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(asdict(verdict), indent=1) + "\n").encode())


def _round_clocks(reports: dict[str, dict]) -> None:
    """Clocks relative to the middle one, for readers: the controller's clock may count from anywhere."""
    offsets = [report["clock_s"] for report in reports.values() if report["clock_s"] is not None]
    if offsets:
        usual = statistics.median_low(offsets)
        for report in reports.values():
            if report["clock_s"] is not None:
                report["clock_s"] = round(report["clock_s"] - usual, 4)
                report["clock_error_s"] = round(report["clock_error_s"], 4)
