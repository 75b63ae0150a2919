"""How long a last save may take, from the request to stop on; all ranks go by the one that was asked first."""

import signal
import time
from types import SimpleNamespace

import pytest

from megascale.train.loop import agree_deadline
from megascale.train.signals import StopRequest


def asked() -> StopRequest:
    stop = StopRequest()
    stop._note(signal.SIGTERM, None)
    return stop


def deadline(stop: StopRequest, others_ms: list[int], grace_s: float = 5.0) -> float | None:
    """Seconds from now, for a rank whose peers have so many milliseconds left, -1 for those that weren't asked."""
    mesh = SimpleNamespace(control_gather=lambda own: [own, *others_ms])
    config = SimpleNamespace(checkpoint=SimpleNamespace(grace_s=grace_s))
    found = agree_deadline(SimpleNamespace(stop=stop, config=config, mesh=mesh))
    return None if found is None else found - time.monotonic()


def test_nothing_limits_a_save_that_nobody_asked_for():
    assert deadline(StopRequest(), [-1, -1]) is None
    assert deadline(asked(), [-1], grace_s=0.0) is None


def test_the_time_runs_from_the_first_request():
    """Mutation: a second signal that begins the time anew."""
    stop = asked()
    first = stop.deadline_s(5.0)
    time.sleep(0.05)
    stop._note(signal.SIGTERM, None)
    assert stop.deadline_s(5.0) == first
    assert 2.0 < deadline(stop, [-1]) <= 4.95


def test_all_ranks_go_by_the_shortest():
    """Mutation: each rank by its own signal; then one gives up a save that the others wait for."""
    assert deadline(StopRequest(), [3000, -1, 9000]) == pytest.approx(3.0, abs=0.5)
    assert deadline(asked(), [2000]) == pytest.approx(2.0, abs=0.5)
    assert deadline(StopRequest(), [0]) == pytest.approx(0.0, abs=0.5)
