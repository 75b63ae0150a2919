"""The life of a job: check the nodes, run attempts on them until the run is complete, and leave a record of each.

It runs on the first node of the job (or on this machine), imports no torch, and holds nothing that the next life of
the run couldn't read from the run folder.
"""

import os
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launcher.submit.plan import MAX_NODE_FAULTS, LaunchPlan
from launcher.supervise.attempt import Attempt, newest_saved
from launcher.supervise.first_error import FIRST_ERROR_FILE
from launcher.supervise.fleet import Event, Fleet
from launcher.supervise.hang_report import REPORT_FILE
from launcher.supervise.policy import (
    REPLACED_RATIO,
    End,
    Requeue,
    Restart,
    Situation,
    StragglerWatch,
    choose_nodes,
    decide,
)
from launcher.supervise.preflight_round import PreflightRound, build_needs, write_report
from launcher.supervise.records import (
    LOGS_FOLDER,
    AttemptRecord,
    LaunchState,
    NodeFault,
    Outcome,
    append_attempt,
    append_node_fault,
    excluded_nodes,
    read_attempts,
    read_node_faults,
    write_state,
)
from launcher.supervise.scribe import Follower, Scribe
from launcher.supervise.transports import Transport
from launcher.supervise.wire import make_token
from megascale.errors import EXIT_OK, LaunchError, MegascaleError
from megascale.observe.console import say
from megascale.train.signals import STOP_FILE

AGENTS_S = 60.0
"""Longest wait for agents at the start of a job."""
NEW_AGENT_S = 20.0
"""Longest wait for another agent on a node that lost its own."""
SETTLED_S = 1.0
"""Until the connections of agents that a failed start took with it are closed."""
STATE_S = 1.0
FOLLOW_S = 0.5
"""Between two looks at rank 0's log."""
WRITTEN_S = 10.0
"""Longest wait for a file system before what it should have taken is given up."""
TOKEN_FILE = "token"
BEGUN_FILE = "begun"
"""In the launch's folder once a step of it is under way: from then on `--fresh` has been obeyed."""
AGAIN_S = 1.0
"""Stop signals within a second of each other are one request."""
REASONS = {"SIGUSR1": "time limit", "SIGUSR2": "time limit", "SIGTERM": "terminated", "SIGINT": "interrupt"}


class Asked:
    """Requests to stop that came as signals.

    Attributes:
        reason: of the first, empty while there is none.
        count: how often the same was asked: the second time is meant to stop at once. SLURM's warning and the SIGTERM
            that follows it are not the same.
    """

    def __init__(self) -> None:
        self.reason, self.count = "", 0
        self._counts: dict[str, int] = {}
        self._last_s = float("-inf")

    def watch(self) -> None:
        """From here on a signal is only noted."""
        for name in REASONS:
            signal.signal(signal.Signals[name], lambda number, frame: self.note(signal.Signals(number).name))

    def note(self, name: str) -> None:
        """A signal came, to this process or to an agent."""
        now_s = time.monotonic()
        if now_s - self._last_s > AGAIN_S:
            self._counts[name] = self._counts.get(name, 0) + 1
            self.count = max(self._counts.values())
        self._last_s = now_s
        self.reason = self.reason or REASONS[name]


class Controller:
    """Runs one life of a launch.

    Args:
        life: its id, see `AttemptRecord`.
        launch_folder: of this launch, see `BEGUN_FILE`.
    """

    def __init__(self, plan: LaunchPlan, transport: Transport, life: str, asked: Asked, launch_folder: Path):
        self._plan, self._transport, self._asked = plan, transport, asked
        self._launch, self._begun_file = launch_folder.name, launch_folder / BEGUN_FILE
        self._logs = plan.folder / LOGS_FOLDER / life
        self._logs.mkdir(parents=True, exist_ok=True)
        self._state = LaunchState(
            life=life, status="starting", unix_s=time.time(), host=socket.gethostname(), pid=os.getpid(),
            job_id=transport.job_id,
        )
        listener = transport.listen()
        self._address = "{}:{}".format(*listener.getsockname()[:2])
        self._token_file = self._logs / TOKEN_FILE
        self._fleet = Fleet(listener, make_token(self._token_file), plan.cluster.limits.node_s)
        self._faults: list[NodeFault] = read_node_faults(plan.folder)
        self._fenced_until_s = 0.0
        self._bad: dict[str, str] = {}
        self._attempt: Attempt | None = None
        self._preflight: PreflightRound | None = None
        self._is_replacing, self._stragglers = False, StragglerWatch()
        self._named: set[int] = set()
        self._state_s = 0.0
        self._scribe = Scribe()

    def run(self) -> int:
        """Runs to the end of this life; returns the job's exit code.

        Raises:
            LaunchError: nothing could be started.
        """
        try:
            return self._carry_out(self._live())
        except MegascaleError as error:
            self._update(force=True, status="ended", exit_code=error.exit_code, last_fault=str(error))
            raise
        finally:
            self._scribe.finish(WRITTEN_S)
            self._fleet.close()
            self._transport.close()
            self._token_file.unlink(missing_ok=True)

    def _live(self) -> Requeue | End:
        stop_file = self._plan.folder / STOP_FILE
        if stop_file.exists():
            return End(EXIT_OK, f"{stop_file} exists: nothing is started; remove it to go on")
        attempts = read_attempts(self._plan.folder, self._launch)
        if self._plan.is_chained and attempts and attempts[-1].outcome == Outcome.DONE:
            return End(EXIT_OK, "the run is complete; this link of the array has nothing to do")
        self._start_agents(self._transport.nodes, AGENTS_S)
        if self._plan.cluster.preflight.is_enabled and not self._asked.count:
            self._check_nodes()
        action = choose_nodes(self._situation(attempts))
        number = 0
        while isinstance(action, Restart):
            record = self._run_attempt(number, action.nodes)
            attempts.append(record)
            action = decide(self._situation(attempts))
            if not isinstance(action, Restart) and record.outcome == Outcome.NODE_LOST and not self._asked.count:
                self._start_agents(action_nodes(record, self._fleet.links), NEW_AGENT_S)
                action = decide(self._situation(attempts))
            number += 1
        return action

    def _carry_out(self, action: Requeue | End) -> int:
        if isinstance(action, Requeue):
            names = f" without {', '.join(action.without)}" if action.without else ""
            self._say(f"{action.why}: back into the queue{names}")
            self._update(force=True, status="requeued")
            self._scribe.finish(WRITTEN_S)
            self._fleet.close()
            self._transport.requeue(action.without)
            return EXIT_OK
        self._say(action.why)
        self._update(force=True, status="ended", exit_code=action.code)
        return action.code

    def _start_agents(self, nodes: Sequence[str], timeout_s: float) -> None:
        """Starts agents on nodes that have none; a node whose agent doesn't come, twice, is left out."""
        awaited = [node for node in nodes if node not in self._fleet.links and node not in self._bad]
        if not awaited:
            return
        self._start_and_wait([awaited], awaited, timeout_s)
        failed = self._transport.failed_start()
        if failed is not None and not self._asked.count:
            self._fleet.wait(lambda: self._asked.count, self._handle, SETTLED_S)
            missing = [node for node in awaited if node not in self._fleet.links]
            sound = [node for node in missing if node not in failed]
            named = f" because of {', '.join(failed)}" if failed else ""
            self._say(f"the start of {len(missing)} agents failed{named}; once more, each such node by itself")
            self._start_and_wait([sound, *([node] for node in missing if node in failed)], awaited, timeout_s)
        for node in awaited:
            if node not in self._fleet.links and not self._asked.count:
                logs = f"{self._logs / f'agent_{node}.log'} and {self._logs / 'srun.log'}"
                self._note_fault(node, "preflight", f"its agent didn't connect within {timeout_s:g} s: see {logs}")

    def _start_and_wait(self, groups: Sequence[Sequence[str]], awaited: Sequence[str], timeout_s: float) -> None:
        """Starts each group by itself; returns when all agents are there, or the last start has failed."""
        for group in filter(None, groups):
            self._transport.start(group, self._address, self._token_file, self._logs)
        self._fleet.wait(
            lambda: all(node in self._fleet.links for node in awaited) or self._asked.count
            or (len(groups) == 1 and self._transport.failed_start() is not None),
            self._handle, timeout_s,
        )

    def _check_nodes(self) -> None:
        self._update(force=True, status="preflight")
        hosts = {node: link.host for node, link in self._fleet.links.items()}
        ordered = {node: hosts[node] for node in self._transport.nodes if node in hosts}
        needs, settings = build_needs(self._plan, self._state.life), self._plan.cluster.preflight
        check = PreflightRound(ordered, settings, needs, self._send_check, time.monotonic)
        self._preflight = check
        check.begin()
        self._fleet.wait(check.is_over, self._handle, settings.limit_s + 5)
        self._preflight, verdict = None, check.verdict()
        write_report(self._logs / "preflight.json", verdict)
        if verdict.is_common:  # the run's doing, or the site's, and no other node would be better
            reasons = "; ".join(f"{node}: {'; '.join(found)}" for node, found in verdict.bad.items())
            raise LaunchError(f"no node passed its pre-flight, so it's none of theirs: {reasons}")
        for node, reasons in verdict.bad.items():
            self._note_fault(node, "preflight", "; ".join(reasons))
            self._fleet.drop(node)
        for note in verdict.notes:
            self._say(f"pre-flight: {note}")
        self._say(f"pre-flight: {len(verdict.good)} of {len(ordered)} nodes are fit, {verdict.seconds:.1f} s")

    def _send_check(self, node: str, message: dict) -> None:
        self._fleet.tell([node], message)

    def _run_attempt(self, number: int, nodes: Sequence[str]) -> AttemptRecord:
        """One attempt from its start until all its ranks are gone."""
        self._fleet.wait(lambda: time.monotonic() > self._fenced_until_s, self._handle, 60.0)
        folder = self._logs / f"attempt_{number}"
        plan = self._plan.without_fresh() if self._begun_file.exists() else self._plan
        attempt = self._attempt = Attempt(self._fleet, plan, self._launch, self._state.life, number, nodes, folder)
        spares = tuple(node for node in self._fleet.links if node not in nodes)
        self._is_replacing, self._stragglers, self._named = False, StragglerWatch(), set()
        self._update(force=True, status="starting", attempt=number, nodes=tuple(nodes), spares=spares, step=-1,
                     phase="", stragglers=(), log_folder=str(folder))
        self._say(f"attempt {number}: {self._plan.world_size} ranks on {', '.join(nodes)}, from step"
                  f" {max(0, newest_saved(self._plan.folder))}; logs in {folder}")
        follower = Follower(folder / "rank_00000.log")
        attempt.start()
        self._supervise(attempt, follower)
        record = attempt.conclude()
        self._scribe.post("log", follower.pass_on)
        self._scribe.finish(WRITTEN_S)
        self._attempt = None
        append_attempt(self._plan.folder, record)
        self._note_outcome(record, attempt)
        return record

    def _supervise(self, attempt: Attempt, follower: Follower) -> None:
        obeyed, is_shown, followed_s, reported_s = 0, False, 0.0, 0.0
        while not attempt.find_fault(is_asked=self._asked.count > 0) and not attempt.is_over:
            for event in self._fleet.events(0.1):
                self._handle(event)
            if time.monotonic() - followed_s > FOLLOW_S:
                followed_s = time.monotonic()
                self._scribe.post("log", follower.pass_on)
            if self._asked.count > obeyed:
                obeyed = self._asked.count
                self._say(f"asked to stop ({self._asked.reason}): "
                          + ("saving first" if obeyed == 1 else "at once, without saving"))
                self._update(force=True, status="stopping")
                if obeyed > 1:
                    break
                attempt.ask_to_stop()
            if attempt.environment and not is_shown:
                is_shown = True
                self._show_environment(attempt.environment)
            if time.monotonic() - reported_s > STATE_S:
                reported_s = time.monotonic()
                self._report_progress(attempt)
        if not attempt.is_over:
            attempt.take_down(0.0 if obeyed > 1 else 1.5)

    def _report_progress(self, attempt: Attempt) -> None:
        beats = attempt.beats
        if not beats:
            return
        slow = self._stragglers.note(beats)
        lines = tuple(f"rank {rank} on {attempt.node_of(rank)} computes {ratio:.2f} times as long as the median rank"
                      for rank, ratio in sorted(slow.items()))
        for rank, line in zip(sorted(slow), lines, strict=True):
            if rank not in self._named:
                self._named.add(rank)
                self._say(f"straggler: {line}")
        first = beats[min(beats)]
        status = self._state.status if self._state.status == "stopping" or first.step < 0 else "running"
        if first.step >= 0:
            self._scribe.post("begun", self._begun_file.touch)
        self._update(status=status, step=first.step, phase=str(first.phase), stragglers=lines)
        if self._state.spares and any(ratio > REPLACED_RATIO for ratio in slow.values()):
            self._replace(attempt, attempt.node_of(max(slow, key=slow.get)), max(slow.values()))

    def _replace(self, attempt: Attempt, node: str, ratio: float) -> None:
        """Saves, and goes on without a node that is so slow that it's as good as broken."""
        if not self._is_replacing:
            self._is_replacing = True
            self._note_fault(node, "preflight", f"computes {ratio:.1f} times as long as the others")
            attempt.ask_to_stop()

    def _note_outcome(self, record: AttemptRecord, attempt: Attempt) -> None:
        if record.outcome in (Outcome.DONE, Outcome.STOPPED):
            return
        self._update(force=True, status="restarting", last_fault=f"{record.outcome}: {record.reason}")
        self._say(f"attempt {record.attempt} {record.outcome}: {record.reason}")
        for name in (FIRST_ERROR_FILE, REPORT_FILE):
            if (attempt.folder / name).exists():
                self._say(f"see {attempt.folder / name}")
        if record.outcome == Outcome.NODE_LOST:
            # Until then a node that was cut off may still train: its agent ends the ranks when it hears nothing.
            self._fenced_until_s = time.monotonic() + self._plan.cluster.limits.node_s + 1
        for node in attempt.faulty_nodes:
            self._note_fault(node, "run", record.reason)

    def _note_fault(self, node: str, kind: str, reason: str) -> None:
        fault = NodeFault(node, time.time(), kind, reason, self._state.life)
        self._faults.append(fault)
        append_node_fault(self._plan.folder, fault)
        if kind == "preflight":
            self._bad[node] = reason
            self._say(f"node {node} is left out: {reason}")

    def _situation(self, attempts: Sequence[AttemptRecord]) -> Situation:
        lemons = excluded_nodes([f for f in self._faults if f.kind == "run"], MAX_NODE_FAULTS)
        present = [node for node in self._transport.nodes if node in self._fleet.links and node not in self._bad]
        usable = [node for node in present if node not in lemons]
        if len(usable) < self._plan.nodes and not self._transport.can_requeue:
            usable, lemons = present, {}  # there are no others: a doubtful node is better than none
        return Situation(
            attempts=attempts, usable=usable, excluded={**lemons, **self._bad}, needed=self._plan.nodes,
            max_attempts=self._plan.max_attempts_without_progress, can_requeue=self._transport.can_requeue,
            is_chained=self._plan.is_chained, asked=self._asked.reason, is_replacing=self._is_replacing,
            job_state=self._transport.job_state() if self._asked.reason else "",
        )

    def _handle(self, event: Event) -> None:
        if event.type == "asked":
            self._asked.note(event.message["name"])
        elif event.type == "lost":
            self._say(f"node {event.node}: {event.message['reason']}")
        if self._preflight is not None:
            if event.type == "preflight":
                self._preflight.on_text(event.node, event.message["text"])
            elif event.type == "preflight_end":
                self._preflight.on_end(event.node, event.message["code"])
            elif event.type == "lost":
                self._preflight.on_lost(event.node)
        if self._attempt is not None:
            self._attempt.handle(event)

    def _show_environment(self, environment: dict[str, str]) -> None:
        shown = [f"{name}={value}" for name, value in sorted(environment.items())
                 if not name.startswith("MEGASCALE_") and name not in ("RANK", "LOCAL_RANK")]
        self._say(f"environment of ranks: {' '.join(shown)}")

    def _update(self, *, force: bool = False, **changes) -> None:
        now_s = time.monotonic()
        changed = replace(self._state, excluded=dict(self._bad), **changes)
        if force or now_s - self._state_s > STATE_S:
            self._state_s = now_s
            dated = replace(changed, unix_s=time.time())
            self._scribe.post("state", lambda: write_state(self._plan.folder, dated))
        self._state = changed

    def _say(self, text: str) -> None:
        say(f"[{time.strftime('%H:%M:%S')}] [{self._state.life}] {text}")


def action_nodes(record: AttemptRecord, present: Sequence[str]) -> list[str]:
    """Nodes of an attempt that have lost their agent: perhaps only that, so another one is tried."""
    return [node for node in record.nodes if node not in present]
