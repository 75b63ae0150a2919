"""A soak: a launched run with a random fault each minute and nobody to help ends as if nothing had happened.

`MEGASCALE_SOAK_MINUTES` is how long faults go on (default 30), `MEGASCALE_SOAK_SEED` which ones.
"""

import os
import random
import signal
import time

import pytest

from launcher.supervise.attempt import newest_saved
from megascale.errors import EXIT_OK
from tests.fault.launched.score import compare
from tests.support.corpus import make_corpus
from tests.support.faulty_run import child_pids, send_signal, wait_until
from tests.support.launched_run import LaunchedRun, Shape, clean_run, launched_run, prepare

MINUTES = float(os.environ.get("MEGASCALE_SOAK_MINUTES", "30"))
SEED = int(os.environ.get("MEGASCALE_SOAK_SEED", "6"))
GAP_S = 60.0
STEP_S = 0.5
NUM_STEPS = max(20, round(MINUTES * 60 / STEP_S))
"""As many as fill the time without any fault; when the faults are over, those left are taken in a hurry."""
SHAPE = Shape(spares=1, changes={
    "train": {"max_steps": NUM_STEPS}, "checkpoint": {"interval_steps": 10, "keep_last": 3},
    "evaluate": {"interval_steps": 50, "max_rows": 8},
})


def kill_a_rank(run: LaunchedRun, rng: random.Random) -> str:
    return strike(run, rng, signal.SIGKILL)


def crash_a_rank(run: LaunchedRun, rng: random.Random) -> str:
    return strike(run, rng, rng.choice([signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS]))


def stop_a_rank(run: LaunchedRun, rng: random.Random) -> str:
    return strike(run, rng, signal.SIGSTOP)


def strike(run: LaunchedRun, rng: random.Random, number: int) -> str:
    """Sends a signal to a rank, whatever it is doing."""
    ranks = [pid for agent in child_pids(run.process.pid) for pid in child_pids(agent)]
    if not ranks:
        return "nobody there"
    send_signal(pid := rng.choice(ranks), number)
    return f"{signal.Signals(number).name} to {pid}"


def kill_an_agent(run: LaunchedRun, rng: random.Random) -> str:
    agents = child_pids(run.process.pid)
    if not agents:
        return "nobody there"
    send_signal(pid := rng.choice(agents), signal.SIGKILL)
    return f"agent {pid} killed"


def ask_to_save(run: LaunchedRun, rng: random.Random) -> str:
    (run.run_folder / "SAVE").touch()
    return "save asked"


def kill_the_controller(run: LaunchedRun, rng: random.Random) -> str:
    """What a scheduler does about it is to start the job again."""
    run.process.kill()
    run.process.wait()
    wait_until(run.is_down, run.text, 20)
    run.start()
    return "controller killed, job started again"


FAULTS = [kill_a_rank, crash_a_rank, stop_a_rank, kill_an_agent, ask_to_save, kill_the_controller]


class Striker:
    """Strikes once a minute, sooner or later at random: also while the run recovers, but not twice in a row, as on a
    machine that takes a minute to start the run that would be a crash loop.
    """

    def __init__(self, run: LaunchedRun, rng: random.Random):
        self._run, self._rng, self._began_s = run, rng, time.monotonic()
        self._next_s, self._saved, self._was_early = self._began_s, -1, False
        self.struck: list[str] = []
        self._plan_next()

    def look(self) -> None:
        """Strikes when it is time."""
        saved, now_s = newest_saved(self._run.run_folder), time.monotonic()
        is_early = saved <= self._saved
        if now_s < self._next_s or (is_early and self._was_early):
            return
        fault = self._rng.choice(FAULTS)
        self.struck.append(f"{now_s - self._began_s:.0f} s, step {saved} saved: {fault(self._run, self._rng)}")
        self._saved, self._was_early = saved, is_early
        self._plan_next()

    def _plan_next(self) -> None:
        self._next_s += GAP_S * self._rng.uniform(0.5, 1.5)


@pytest.mark.slow
def test_a_run_survives_a_random_fault_each_minute(tmp_path):
    """The final weights are the clean run's, to the bit. Mutations that must fail it: those of the launched tests."""
    corpus = make_corpus(tmp_path / "corpus", num_documents=max(64, NUM_STEPS), vocab_size=64)
    plan = prepare(tmp_path / "launch", corpus, SHAPE)
    with launched_run(tmp_path / "faults", plan, [], step_s=STEP_S) as run:
        striker, end_s = Striker(run, random.Random(SEED)), time.monotonic() + MINUTES * 60
        while run.process.poll() is None and time.monotonic() < end_s:
            striker.look()
            time.sleep(0.1)
        is_through = run.process.poll() is None
        (run.folder / "hurry").touch()
        code = run.wait(MINUTES * 60 + 900)
        attempts = [f"{a.life} attempt {a.attempt}: {a.outcome}, saved {a.ended_step}; {a.reason}"
                    for a in run.attempts()]
        print("\n".join([*striker.struck, *attempts]))
        assert code == EXIT_OK, run.text()[-3000:]
    assert is_through, "it ended before the faults did"
    assert len(striker.struck) >= MINUTES / 3
    clean = clean_run(tmp_path / "clean", corpus, Shape(changes=SHAPE.changes))
    assert compare(tmp_path / "launch" / "run", clean, NUM_STEPS) == []
