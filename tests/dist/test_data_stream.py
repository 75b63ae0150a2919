"""The stream of a run over ranks: killed and resumed on other numbers of replicas, shared out in other layouts, in a
batch that grows. The rows are those of a run on one rank that nobody touched: digest, ledger and losses.

Mutations seen to be caught: a resumed stream that goes on a step late; a tp rank that reads another replica's rows,
which the loop itself refuses.
"""

import json
from pathlib import Path

import pytest

from launcher.local import run_local
from megascale.checkpoint.find import peek_checkpoint
from megascale.checkpoint.local_store import LocalStore
from megascale.checkpoint.state import RunState
from megascale.errors import RankFailedError
from tests.support.corpus import make_corpus
from tests.support.tiny_run import megascale, read_metrics, write_blend

FAULTY_RANK = "tests.fault.programs.faulty_rank"
ROWS, STEPS = 12, 9
"""12 rows go into 1, 3, 4 and 6 replicas."""
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    for seed, name in enumerate(("code", "web")):
        make_corpus(folder / name, 20 + 20 * seed, vocab_size=64, seed=seed)
    return folder


def train(folder: Path, name: str, num_ranks: int, *overrides: str) -> Path:
    """Trains the blend to its end in a run folder of its own."""
    done = megascale("train", write_blend(folder, name), *overrides, "--nproc", str(num_ranks))
    assert done.returncode == 0, done.stderr
    return folder / name


def state_of(run: Path) -> RunState:
    return peek_checkpoint(LocalStore(run)).index.state


def losses(run: Path) -> dict[tuple, float]:
    return {(line["kind"], line["step"]): line["loss"] for line in read_metrics(run)}


def assert_same_stream(run: Path, expected: Path) -> None:
    found, state = state_of(run), state_of(expected)
    assert (found.rows, found.ledger, found.stream_digest) == (state.rows, state.ledger, state.stream_digest)
    assert losses(run) == pytest.approx(losses(expected), abs=TOLERANCE)


@pytest.fixture(scope="module")
def alone(folder):
    return train(folder, "alone", 1)


def test_killed_on_4_replicas_and_resumed_on_6_and_3(folder, alone, tmp_path, monkeypatch):
    """Each kill loses steps since the last checkpoint, which the next session reads again."""
    config = write_blend(folder, "resized")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for num_ranks, kill in ((4, {"rank": 2, "step": 4, "phase": "backward"}),
                            (6, {"rank": 5, "step": 7, "phase": "forward"}), (3, {})):
        plan = tmp_path / f"plan_{num_ranks}.json"
        plan.write_text(json.dumps({"ledger": str(tmp_path)} | kill))
        monkeypatch.setenv("MEGASCALE_TEST_PLAN", str(plan))
        if kill:
            with pytest.raises(RankFailedError, match="was killed by SIGKILL"):
                run_local([str(config)], num_ranks, FAULTY_RANK)
        else:
            run_local([str(config)], num_ranks, FAULTY_RANK)
    assert_same_stream(folder / "resized", alone)
    assert state_of(alone).rows == ROWS * STEPS


@pytest.mark.parametrize(("num_ranks", "overrides"), [(4, ["tp=2"]), (2, ["cp=2"])], ids=str)
def test_the_ranks_of_a_replica_read_the_same_rows(folder, alone, num_ranks, overrides):
    run = train(folder, "-".join(overrides).replace("=", ""), num_ranks,
                *(f"parallel.{override}" for override in overrides))
    assert_same_stream(run, alone)


RAMP = "train.batch_ramp=[{until_step: 2, global_batch_tokens: 128}, {until_step: 5, global_batch_tokens: 256}]"


def test_a_ramped_pipeline_is_the_ramped_plain_run(folder):
    """Steps of 4, 8 and 12 rows, the micro-batches of a pipeline growing with them."""
    plain = train(folder, "ramped", 1, RAMP)
    assert state_of(plain).rows == 2 * 4 + 3 * 8 + 4 * 12
    pipeline = train(folder, "ramped-pp2", 2, RAMP, "parallel.pp=2", "parallel.schedule=1f1b")
    assert_same_stream(pipeline, plain)
