"""A run that is killed again and again ends as the run that nobody touched: metrics, weights, moments, tokens read.

Mutations seen to be caught: the optimizer's step count not restored; `rows` not restored (the stream starts over);
moments left out of the state pieces.
"""

import json
import time
from pathlib import Path

import pytest

from launcher.local import run_local
from megascale.errors import EXIT_RUN, RankFailedError
from tests.support.corpus import make_corpus
from tests.support.tiny_run import curve, write_config

MODULE = "tests.fault.programs.faulty_rank"
ROWS_PER_STEP, NUM_STEPS = 8, 12

KILLS = [
    (1, 0, "forward"), (0, 2, "backward"), (1, 5, "reduce"), (0, 7, "update"), (1, 8, "save"), (0, 8, "staged"),
    (0, 11, "log"),
]
MORE_KILLS = [
    (rank, step, phase)
    for phase, steps in {
        "forward": (4, 10), "backward": (6,), "reduce": (0, 9), "update": (3, 11), "evaluate": (3, 7), "save": (2, 5),
        "log": (1, 6), "staged": (2, 5),
    }.items()
    for step in steps
    for rank in (0, 1)
] + [(0, 5, "commit"), (0, 11, "commit")]


def run(config: Path, ledger: Path, monkeypatch, kill=None) -> None:
    """One attempt on two ranks; `kill` is (rank, step, phase)."""
    ledger.mkdir(exist_ok=True)
    plan = {"ledger": str(ledger)} | (dict(zip(("rank", "step", "phase"), kill, strict=True)) if kill else {})
    path = ledger / "plan.json"
    path.write_text(json.dumps(plan))
    monkeypatch.setenv("MEGASCALE_TEST_PLAN", str(path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    in_rank = kill is not None and kill[2] in ("save", "commit")  # otherwise a process beside the rank does these
    run_local([str(config), *(["checkpoint.asynchronous=false"] if in_rank else [])], 2, MODULE)


def read_ledger(ledger: Path) -> dict[int, dict]:
    """By step: rows and token hashes over both ranks. A step trained twice, before and after a kill, must agree."""
    steps: dict[int, dict] = {}
    for rank in (0, 1):
        for line in map(json.loads, (ledger / f"rank_{rank}.jsonl").read_text().splitlines()):
            entry = steps.setdefault(line["step"], {})
            assert entry.setdefault(rank, line) == line, f"step {line['step']}: other tokens after a resume"
    return steps


def assert_same_end(clean: Path, killed: Path) -> None:
    """Metrics and the final checkpoint are equal to the bit."""
    assert curve(killed) == curve(clean)
    name = f"checkpoints/step_{NUM_STEPS:08d}"
    for path in sorted((clean / name).glob("*.safetensors")):
        assert (killed / name / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A run that nobody interrupts, with its ledger."""
    folder = tmp_path_factory.mktemp("clean")
    corpus = make_corpus(folder / "corpus", vocab_size=64)
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(write_config(folder, corpus), folder / "ledger", monkeypatch)
    return folder


def check_kills(kills, clean: Path, tmp_path: Path, monkeypatch) -> None:
    config, ledger = write_config(tmp_path, clean / "corpus"), tmp_path / "ledger"
    for kill in kills:
        started_s = time.monotonic()
        with pytest.raises(RankFailedError, match=rf"rank {kill[0]} was killed by SIGKILL") as caught:
            run(config, ledger, monkeypatch, kill)
        assert caught.value.exit_code == EXIT_RUN
        assert time.monotonic() - started_s < 60
    run(config, ledger, monkeypatch)
    assert_same_end(clean / "run", tmp_path / "run")
    steps = read_ledger(ledger)
    assert steps == read_ledger(clean / "ledger")
    rows = [row for step in sorted(steps) for rank in (0, 1) for row in steps[step][rank]["rows"]]
    assert sorted(rows) == list(range(ROWS_PER_STEP * NUM_STEPS)), "every row of the stream is read once"


def test_killed_in_every_phase(clean, tmp_path, monkeypatch):
    check_kills(KILLS, clean, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("kill", MORE_KILLS, ids=lambda kill: "-".join(map(str, kill)))
def test_killed_once_anywhere(kill, clean, tmp_path, monkeypatch):
    check_kills([kill], clean, tmp_path, monkeypatch)
