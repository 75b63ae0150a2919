"""`megascale data audit`: it agrees with what a run stored, and with nothing else."""

import re
import shutil
from dataclasses import replace

import pytest

from data_tools.audit import audit_run
from megascale.checkpoint.find import read_stored_index
from megascale.checkpoint.local_store import LocalStore
from megascale.data.ledger import ReadCounts
from megascale.errors import DataError
from megascale.parallel.layout import Layout
from tests.support.corpus import QUIET, make_corpus
from tests.support.past_run import PastSession, make_past_run, save_state
from tests.support.streams import stream_config

SESSIONS = [PastSession(0, 12, Layout(dp=2)), PastSession(8, 40, Layout(dp=3)), PastSession(40, 50, Layout(dp=1))]
LAST_STEP = 50


def make_run(folder, packing="bestfit", **data):
    corpora = {
        name: {"folder": str(make_corpus(folder / name, num_documents=number, seed=number)), "weight": weight}
        for name, number, weight in (("web", 60, 3), ("code", 9, 2))
    }
    stages = [{"from_step": 20, "weights": {"web": 1, "code": 4}}]
    config = stream_config(corpora, data={"packing": packing, "stages": stages, **data}, train={"max_steps": LAST_STEP})
    make_past_run(folder / "run", config, SESSIONS)
    return folder / "run"


@pytest.fixture(scope="module", params=["concat", "bestfit", "none"])
def past(request, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("past"), request.param)


@pytest.fixture
def run_folder(past, tmp_path):
    return shutil.copytree(past, tmp_path / "run")


def test_a_run_that_tells_the_truth(past):
    """Several epochs of one corpus, part of one of the other; a session that went back; a mixture that changed. Caught
    mutations: new tokens counted with the overlap; whole epochs left out; a step's digest without its row numbers."""
    found = audit_run(past, reads_tokens=True, console=QUIET)
    assert found.faults == []
    assert len(found.table) == 4
    assert "0 masked" in found.table[1]


@pytest.mark.parametrize(("change", "fault"), [
    (lambda counts: replace(counts, rows=counts.rows + 1), r"code: [\d,]+ rows, the ledger says"),
    (lambda counts: replace(counts, tokens=counts.tokens - 1), r"code: [\d,]+ tokens, the ledger says"),
    (lambda counts: replace(counts, masked_rows=1), r"code: 0 masked rows, the ledger says 1"),
])
def test_a_ledger_that_is_one_off(run_folder, change, fault):
    state = read_stored_index(LocalStore(run_folder), LAST_STEP).state
    restate(run_folder, replace(state, ledger=state.ledger | {"code": change(state.ledger["code"])}))
    (found,) = audit_run(run_folder, reads_tokens=False, console=QUIET).faults
    assert_matches(fault, found)


def test_a_digest_of_other_tokens_is_seen_by_reading_only(run_folder):
    state = read_stored_index(LocalStore(run_folder), LAST_STEP).state
    restate(run_folder, replace(state, stream_digest=f"{int(state.stream_digest, 16) ^ 1:016x}"))
    assert audit_run(run_folder, reads_tokens=False, console=QUIET).faults == []
    (found,) = audit_run(run_folder, reads_tokens=True, console=QUIET).faults
    assert_matches(f"the stream digest is {state.stream_digest}, .* says ", found)


def test_a_position_or_a_corpus_that_cannot_be(run_folder):
    state = read_stored_index(LocalStore(run_folder), LAST_STEP).state
    restate(run_folder, replace(state, rows=state.rows - 12, ledger=state.ledger | {"old": ReadCounts(5, 5, 0)}))
    faults = audit_run(run_folder, reads_tokens=False, console=QUIET).faults
    assert len(faults) == 2
    assert_matches("50 steps read 600 rows, .* says 588", faults[0])
    assert_matches("old: is in the ledger, but not in the config", faults[1])


@pytest.mark.parametrize("packing", ["concat", "bestfit"])
def test_masked_rows_are_taken_from_the_skips(tmp_path, packing):
    """A shard with a flipped bit. Caught mutation: tokens of masked rows counted."""
    shard = make_corpus(tmp_path / "web", num_documents=60, seed=60) / "train/shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[2000] ^= 1
    shard.write_bytes(content)
    config = stream_config(tmp_path / "web", data={"packing": packing, "on_bad_shard": "mask"}, train={"max_steps": 50})
    run = tmp_path / "run"
    make_past_run(run, config, SESSIONS)
    found = audit_run(run, reads_tokens=True, console=QUIET)
    assert found.faults == []
    assert ", 0 masked" not in found.table[1]
    (run / "data_skips.jsonl").unlink()
    with pytest.raises(DataError, match=r"shard-000000.tar: block \d: crc32"):
        audit_run(run, reads_tokens=True, console=QUIET)


def test_a_run_without_a_checkpoint_is_refused(run_folder):
    shutil.rmtree(run_folder / "checkpoints")
    with pytest.raises(DataError, match="has no checkpoint, which keeps the ledger"):
        audit_run(run_folder, reads_tokens=False, console=QUIET)


def restate(run_folder, state):
    """Replaces the state of the last checkpoint."""
    shutil.rmtree(run_folder / "checkpoints")
    save_state(run_folder, state)


def assert_matches(pattern, text):
    assert re.search(pattern, text), text
