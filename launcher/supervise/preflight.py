"""The pre-flight's program on a node: `python -m launcher.supervise.preflight REQUEST_JSON`.

It prints lines of JSON: `{"listen": {"host", "port"}}` when other nodes can send to it, `{"clock": SECONDS}` at once
for each `{"time": true}` on its standard input, and `{"report": ...}` when all checks are done. It sends to those
that `{"peers": [...]}` names. It ends after `{"done": true}`, or the end of its input, and anyway after `limit_s`.

No check can hold up the report: each runs in a thread of its own, since a folder of a dead file server blocks even
`stat` for ever, and one that doesn't come back is reported as such.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

from launcher.supervise.preflight_checks import Check, list_checks
from launcher.supervise.preflight_network import Sink, measure_gbps
from megascale.errors import EXIT_OK, EXIT_USER, MegascaleError

REPORT_FRACTION = 0.8
"""The report leaves the node after this part of the limit at the latest, so that it is there in time."""
PEERS_FRACTION = 0.45
"""So long a node waits to hear whom to send to; the controller tells after a third of the limit at the latest."""


class Running:
    """A check under way in a thread of its own."""

    def __init__(self, check: Check):
        self.check, self.facts, self.problem = check, {}, ""
        self.took_s: float | None = None
        self._began_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        facts, problem = {}, ""
        try:
            facts = self.check.run()
        except MegascaleError as error:
            problem = str(error)
        except Exception as error:  # a check that fails for whatever reason hasn't passed
            problem = f"{self.check.what}: {type(error).__name__}: {error}"
        self.facts, self.problem, self.took_s = facts, problem, round(time.monotonic() - self._began_s, 3)

    def wait(self, until_s: float) -> None:
        """Waits for the check's own limit, and never beyond `until_s`; what isn't done then is a problem."""
        limit_s = min(self.check.limit_s, until_s - self._began_s)
        self._thread.join(max(0.0, self._began_s + limit_s - time.monotonic()))
        if self.took_s is None:
            advice = f": {self.check.advice}" if self.check.advice else ""
            self.problem = f"{self.check.what}: did not answer within {round(limit_s, 1):g} s{advice}"


@dataclass
class Conversation:
    """The two ends of talking with the controller: lines out, and what lines in have told."""

    has_peers: threading.Event = field(default_factory=threading.Event)
    is_done: threading.Event = field(default_factory=threading.Event)
    peers: list[dict] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def say(self, line: dict) -> None:
        """One line to the controller."""
        with self._lock:
            print(json.dumps(line), flush=True)

    def listen(self) -> None:
        """Obeys the lines of the controller until there are no more."""
        for text in sys.stdin:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if "time" in line:
                self.say({"clock": time.time()})
            if "peers" in line:
                self.peers = line["peers"]
                self.has_peers.set()
            if "done" in line:
                break
        self.is_done.set()
        self.has_peers.set()


def measure_peers(peers: list[dict], token: str, stop_s: float) -> dict:
    """Bandwidth to each peer in turn: facts `bandwidth`, a list of `{"peer", "gbps"}` or `{"peer", "error"}`."""
    found = []
    for peer in peers:
        if time.monotonic() > stop_s:
            break
        try:
            found.append({"peer": peer["node"], "gbps": measure_gbps(peer["host"], peer["port"], token)})
        except MegascaleError as error:
            found.append({"peer": peer["node"], "error": str(error)})
    return {"bandwidth": found}


def run_checks(checks: list[Check], until_s: float) -> tuple[dict, dict[str, str], dict[str, float]]:
    """Runs checks beside each other until they are done, or until `until_s` of the monotonic clock.

    Returns:
        Facts of all, problems by check, seconds by check. What fails but is information only goes to the facts.
    """
    under_way = [Running(check) for check in checks]
    facts, problems = {}, {}
    for running in under_way:
        running.wait(until_s)
        facts |= running.facts
        if running.problem and running.check.is_information:
            facts.setdefault("unknown", []).append(running.problem)
        elif running.problem:
            problems[running.check.what] = running.problem
    return facts, problems, {running.check.what: running.took_s for running in under_way if running.took_s is not None}


def examine(
    request: dict, conversation: Conversation, began_s: float,
    list_of: Callable[[dict, float], list[Check]] = list_checks,
) -> dict:
    """Opens the sink, runs all checks and the bandwidth test, and returns the report."""
    limit_s = request["limit_s"]
    until_s = began_s + REPORT_FRACTION * limit_s
    try:
        sink = Sink(request["host"], request["network_token"])
        conversation.say({"listen": {"host": request["host"], "port": sink.port}})
    except OSError as error:  # the check of the port says why
        conversation.say({"listen": None, "error": str(error)})

    def bandwidth() -> dict:
        conversation.has_peers.wait(max(0.0, began_s + PEERS_FRACTION * limit_s - time.monotonic()))
        return measure_peers(conversation.peers, request["network_token"], until_s)

    network = Check("bandwidth", bandwidth, limit_s, is_information=True)  # the controller judges it, over all nodes
    product_s = REPORT_FRACTION * limit_s - 1.5
    facts, problems, seconds = run_checks([*list_of(request, product_s), network], until_s)
    return {
        "node": request["node"], "wanted": {"gpus": request["gpus"], "cores": request["cores"]}, "facts": facts,
        "problems": problems, "seconds": seconds, "took_s": round(time.monotonic() - began_s, 3),
    }


def main(request_json: str) -> NoReturn:
    """Serves one request; ends the process without waiting for threads that hang."""
    began_s = time.monotonic()
    code = EXIT_OK
    try:
        request = json.loads(request_json)
        conversation = Conversation()
        threading.Thread(target=conversation.listen, daemon=True).start()
        conversation.say({"report": examine(request, conversation, began_s)})
        conversation.is_done.wait(max(0.0, began_s + request["limit_s"] - time.monotonic()))  # others still send here
    except (ValueError, KeyError) as error:
        print(f"error: not a request of the pre-flight: {error}", file=sys.stderr)
        code = EXIT_USER
    except OSError:  # nobody reads what we say: the agent is gone
        pass
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("error: one argument, the request as JSON; the agent of a node starts this program")
    main(sys.argv[1])
