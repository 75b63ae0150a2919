"""One attempt of a run: all ranks started together, watched from outside, and gone together."""

import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.local import RANK_MODULE
from launcher.submit.plan import LaunchPlan
from launcher.supervise.first_error import FIRST_ERROR_FILE, RankEnd, first_cause, summarize, write_first_error
from launcher.supervise.fleet import Event, Fleet
from launcher.supervise.hang import STOPPED_STATE, Blame, Hang, RankView, find_culprit, find_hang
from launcher.supervise.hang_report import REPORT_FILE, summarize_hang, write_hang_report
from launcher.supervise.rank_dumps import read_dumps
from launcher.supervise.records import AttemptRecord, Outcome
from megascale.checkpoint.folders import list_steps
from megascale.checkpoint.run_file import read_saved
from megascale.errors import EXIT_OK, EXIT_STOPPED, EXIT_USER
from megascale.parallel.heartbeat import Beat, Phase
from megascale.parallel.supervision import INCARNATION_VARIABLE, LIFE_VARIABLE

STORE_S = 15.0
GRACE_S = 1.5
"""After one rank failed, the others have this long to report a fault of their own before they are ended."""
GONE_S = 10.0
"""A node that hasn't ended its ranks after so long is cut off."""
DUMP_S = 4.0
HANG_LOOK_S = 0.5
"""Between two looks for a hang, which go over all ranks."""
FLIGHT_RECORDER = {"TORCH_FR_BUFFER_SIZE": "2000"}


@dataclass(frozen=True)
class Loss:
    """A node that is gone."""

    node: str
    reason: str
    silent_s: float


class Attempt:
    """Runs all ranks once.

    Args:
        launch, life, number: see `AttemptRecord`.
        nodes: that train; rank 0 is on the first.
        folder: for the logs of this attempt.
    """

    def __init__(
        self, fleet: Fleet, plan: LaunchPlan, launch: str, life: str, number: int, nodes: Sequence[str], folder: Path
    ):
        self._fleet, self._plan, self._launch, self._life, self._number = fleet, plan, launch, life, number
        self.nodes, self.folder = tuple(nodes), folder
        self._began_s = time.time()
        self._began_step = newest_saved(plan.folder)
        self.views: dict[int, RankView] = {}
        self.ends: dict[int, RankEnd] = {}
        self.environment: dict[str, str] = {}
        self.first_step_s: float | None = None
        self._store: dict | None = None
        self._gone: set[str] = set()
        self._loss: Loss | None = None
        self._hang: Hang | None = None
        self._hang_looked_s = float("-inf")
        self._fault_s: float | None = None
        self._looked_since: dict[int, float] = {}
        self._stopped_since: dict[int, float] = {}
        self._blame: Blame | None = None
        self._summary = ""
        self._is_asked = self._is_killed = False
        self._own_ends: list[RankEnd] = []

    def start(self) -> None:
        """Opens the rendezvous on the first node and starts all ranks; a node that fails at it shows as lost."""
        self.folder.mkdir(parents=True, exist_ok=True)
        first, cluster = self.nodes[0], self._plan.cluster
        self._fleet.tell([first], {"type": "open_store", "attempt": self._number, "interface": cluster.interface})
        if absent := [node for node in self.nodes if node not in self._fleet.links]:
            self._loss = Loss(absent[0], "its agent was gone before the attempt began", 0.0)
        if not self._fleet.wait(lambda: self._store or self._loss, self.handle, STORE_S):
            self._loss = Loss(first, "it opened no rendezvous", STORE_S)
        if self._loss:
            self._gone.update(self.nodes)  # no rank was started anywhere
            return
        incarnation = f"{self._life}.{self._number}"
        environment = FLIGHT_RECORDER | cluster.environment | {
            "WORLD_SIZE": str(self._plan.world_size), "MASTER_ADDR": self._store["host"],
            "MASTER_PORT": str(self._store["port"]), INCARNATION_VARIABLE: incarnation,
            LIFE_VARIABLE: self._life,
        }
        each = self._plan.ranks_per_node
        for index, node in enumerate(self.nodes):
            self._fleet.tell([node], {
                "type": "start", "attempt": self._number, "folder": str(self.folder), "environment": environment,
                "ranks": list(range(index * each, (index + 1) * each)), "interface": cluster.interface,
                "command": [cluster.python or sys.executable, "-m", RANK_MODULE, self._plan.config,
                            *self._plan.arguments],
            })

    def handle(self, event: Event) -> None:
        """Takes note of what a node says."""
        message = event.message
        if event.node not in self.nodes or message.get("attempt", self._number) != self._number:
            return
        if event.type == "lost":
            self._loss = self._loss or Loss(event.node, message["reason"], message["silent_s"])
            self._gone.add(event.node)
        elif event.type == "store":
            self._store = message
        elif event.type == "started":
            self.environment = message["environment"]
        elif event.type == "beats":
            self._note_beats(event.node, message)
        elif event.type == "exit":
            self._note_end(event.node, message)
        elif event.type == "gone":
            self._gone.add(event.node)

    def find_fault(self, *, is_asked: bool = False) -> bool:
        """Looks for a reason to end the attempt: a failed rank, a lost node, a hang.

        Args:
            is_asked: whether the run was asked to stop; ranks that were still starting then simply end.
        """
        self._is_asked = self._is_asked or is_asked
        if self._fault_s is not None:
            return True
        if not self._loss and not self._failed_ends():
            if time.monotonic() - self._hang_looked_s < HANG_LOOK_S:
                return False
            self._hang_looked_s = time.monotonic()
            views = [view for rank, view in self.views.items() if rank not in self.ends]
            self._hang = find_hang(views, self._plan.cluster.limits) if views else None
            if self._hang is None:
                return False
        self._fault_s = time.monotonic()
        return True

    @property
    def is_over(self) -> bool:
        """Whether all ranks are gone."""
        return self._gone >= set(self.nodes)

    @property
    def beats(self) -> dict[int, Beat]:
        """The last heartbeat of each rank that runs."""
        return {rank: view.beat for rank, view in self.views.items() if view.beat and rank not in self.ends}

    def ask_to_stop(self) -> None:
        """Asks all ranks to save and stop."""
        self._fleet.tell(self.nodes, {"type": "signal", "attempt": self._number, "name": "SIGTERM"})

    def take_down(self, grace_s: float = GRACE_S) -> None:
        """Ends all ranks: the first fault's witnesses first have a moment to speak."""
        if self._hang is not None:
            self._collect_dumps()
        else:
            self._fleet.wait(lambda: self.is_over or self._all_ended(), self.handle, grace_s)
        self.kill()

    def kill(self) -> None:
        """Ends all ranks at once; a node that doesn't is cut off, and ends them itself."""
        self._is_killed = True
        self._fleet.tell(self.nodes, {"type": "kill", "attempt": self._number})
        if not self._fleet.wait(lambda: self.is_over, self.handle, GONE_S):
            for node in set(self.nodes) - self._gone:
                self._loss = self._loss or Loss(node, f"its ranks didn't end within {GONE_S:g} s", GONE_S)
                self._fleet.drop(node)

    def conclude(self) -> AttemptRecord:
        """What the attempt came to; writes the first error or the hang report where there was one."""
        down_s = time.monotonic() - self._fault_s if self._fault_s is not None else None
        outcome, culprit, reason, detected_s = self._judge()
        reached = max((view.beat.step for view in self.views.values() if view.beat), default=-1)
        return AttemptRecord(
            launch=self._launch, life=self._life, attempt=self._number, nodes=self.nodes,
            began_s=self._began_s, ended_s=time.time(),
            began_step=self._began_step, ended_step=newest_saved(self._plan.folder), reached_step=reached,
            outcome=outcome, culprit=culprit, reason=reason, detected_s=detected_s, down_s=down_s,
            first_step_s=self.first_step_s,
        )

    @property
    def faulty_nodes(self) -> list[str]:
        """Nodes whose fault the end may be: lost, with a hung rank, or with one that a signal killed first."""
        if self._loss:
            return [self._loss.node]
        if self._hang is not None:
            known = self._blame.ranks if self._blame and self._blame.is_known else ()
            return sorted({self.node_of(rank) for rank in known})
        failed = self._failed_ends()
        first = first_cause(failed) if failed else None
        return [first.node] if first is not None and first.code < 0 else []

    def node_of(self, rank: int) -> str:
        """The node that a rank is on."""
        return self.nodes[rank // self._plan.ranks_per_node]

    def _judge(self) -> tuple[str, str, str, float | None]:
        """Outcome, culprit, reason, and how long the fault took to be found."""
        failed = self._failed_ends()
        if self._loss:
            return Outcome.NODE_LOST, self._loss.node, f"{self._loss.node}: {self._loss.reason}", self._loss.silent_s
        if self._hang is not None:
            who = ", ".join(f"rank {rank} on {self.node_of(rank)}" for rank in self._blame.ranks[:4])
            return Outcome.HUNG, who, self._summary, self._hang.silent_s
        if failed:
            first = first_cause(failed)
            write_first_error(self.folder / FIRST_ERROR_FILE, self._own_ends)
            who, reason = f"rank {first.rank} on {first.node}", summarize(self._own_ends)
            detected_s = max(0.0, time.time() - first.unix_s - (time.monotonic() - self._fault_s))
            is_refusal = first.code == EXIT_USER and self.first_step_s is None
            return Outcome.REFUSED if is_refusal else Outcome.FAILED, who, reason, detected_s
        if self._is_killed:
            return Outcome.FAILED, "", "ended at once, as asked, without saving", None
        is_done = len(self.ends) == self._plan.world_size and all(e.code == EXIT_OK for e in self.ends.values())
        if is_done:
            return Outcome.DONE, "", "", None
        return Outcome.STOPPED, "", self._last_words(), None

    def _failed_ends(self) -> list[RankEnd]:
        """Ends of ranks that nobody ended, and that are faults."""
        return [end for end in self._own_ends
                if is_failure(end) and not (self._is_asked and end.code == -signal.SIGTERM)]

    def _last_words(self) -> str:
        stopped = [end for end in self.ends.values() if end.code == EXIT_STOPPED and end.tail.strip()]
        return stopped[0].tail.strip().splitlines()[-1] if stopped else "stopped before it began"

    def _all_ended(self) -> bool:
        return len(self.ends) == self._plan.world_size

    def _note_beats(self, node: str, message: dict) -> None:
        for rank, *values, state in message["ranks"]:
            beat = Beat(Phase(values[0]), *values[1:]) if values else None
            now_s = message["now_s"]
            if state != STOPPED_STATE:
                self._stopped_since.pop(rank, None)
            else:
                self._stopped_since.setdefault(rank, now_s)
            self.views[rank] = RankView(
                rank, node, beat, state, now_s=now_s, began_s=self._looked_since.setdefault(rank, now_s),
                stopped_since_s=self._stopped_since.get(rank),
            )
            if beat is not None and beat.steps_taken and self.first_step_s is None:
                self.first_step_s = time.time()

    def _note_end(self, node: str, message: dict) -> None:
        known = RankEnd.__dataclass_fields__
        end = RankEnd(node=node, **{name: value for name, value in message.items() if name in known})
        self.ends[end.rank] = end
        if not self._is_killed:
            self._own_ends.append(end)

    def _collect_dumps(self) -> None:
        views = [view for rank, view in self.views.items() if rank not in self.ends]  # as they are, before the thaw
        self._fleet.tell(self.nodes, {"type": "dump"})
        self._fleet.wait(self._has_dumps, self.handle, DUMP_S)
        self._fleet.tell(self.nodes, {"type": "thaw"})  # a stopped rank dumps when it goes on, before all else
        self._fleet.wait(self._has_dumps, self.handle, 1.0)
        dumps = read_dumps(self.folder, self._plan.world_size)
        self._blame = find_culprit(self._hang, views, dumps)
        self._summary = summarize_hang(self._hang, self._blame, views)
        now = time.strftime("%Y-%m-%d %H:%M:%S %z")
        write_hang_report(self.folder / REPORT_FILE, self._hang, self._blame, views, dumps, now)

    def _has_dumps(self) -> bool:
        awaited = self._plan.world_size - len(self.ends)
        return len(list(self.folder.glob("collectives_*.json"))) >= awaited


def is_failure(end: RankEnd) -> bool:
    """Whether a rank ended as none should; also one that ended well while the run was still under way."""
    return end.code not in (EXIT_OK, EXIT_STOPPED) or (end.code == EXIT_OK and end.phase != Phase.CLOSE)


def newest_saved(folder: Path) -> int:
    """The newest checkpoint, -1 for none: of those in the run folder, or in an object store what the run noted."""
    noted = read_saved(folder)
    return max([-1 if noted is None else noted, *list_steps(folder)])

