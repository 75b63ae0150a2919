"""A blend through the command line: a mixture that changes at a resume, kills, validation by corpus, bad shards, S3.

Mutations seen to be caught: the ledger not restored; the losses of corpora averaged without their tokens; no limit to
masked rows; a step divided by its number of labels.
"""

import json
import shutil

import numpy as np
import pytest

from launcher.local import run_local
from megascale.checkpoint.find import peek_checkpoint
from megascale.checkpoint.local_store import LocalStore
from megascale.config.derive import derive
from megascale.config.load import load_config
from megascale.data.ledger import count_rows
from megascale.data.stream import open_stream
from megascale.errors import RankFailedError
from tests.support.corpus import make_corpus
from tests.support.s3_server import serve_s3
from tests.support.tiny_run import megascale, read_metrics, write_blend

FAULTY_RANK = "tests.fault.programs.faulty_rank"
STAGE = "data.stages=[{from_step: 6, weights: {code: 1.0, web: 0.5}}]"
NUM_ROWS = 9 * 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blend")
    for seed, name in enumerate(("code", "web")):
        make_corpus(folder / name, 20 + 20 * seed, vocab_size=64, seed=seed)
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """A run with the change planned from the start, that nobody interrupted."""
    done = megascale("train", write_blend(folder, "whole"), STAGE, "--nproc", "1")
    assert done.returncode == 0, done.stderr
    return folder / "whole"


def state_of(run):
    return peek_checkpoint(LocalStore(run)).index.state


def test_a_mixture_changed_mid_way_and_two_kills(folder, whole, tmp_path, monkeypatch):
    """The stage is added at the first resume; ledger and digest are those of the run that had it from the start."""
    config = write_blend(folder, "killed")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for step, overrides in ((4, []), (7, [STAGE]), (None, [STAGE])):
        kill = {} if step is None else {"rank": 1, "step": step, "phase": "backward"}
        (tmp_path / "plan.json").write_text(json.dumps({"ledger": str(tmp_path)} | kill))
        monkeypatch.setenv("MEGASCALE_TEST_PLAN", str(tmp_path / "plan.json"))
        if kill:
            with pytest.raises(RankFailedError, match="rank 1 was killed by SIGKILL"):
                run_local([str(config), *overrides], 2, FAULTY_RANK)
        else:
            run_local([str(config), *overrides], 2, FAULTY_RANK)
    state, expected = state_of(folder / "killed"), state_of(whole)
    assert (state.ledger, state.stream_digest) == (expected.ledger, expected.stream_digest)
    planned = load_config(config, [STAGE])
    stream = open_stream(planned, derive(planned, 1))
    read = stream.read(np.arange(NUM_ROWS))
    counts = count_rows(2, read.places.corpora, np.arange(NUM_ROWS), read.rows, labels=0).read
    assert dict(zip(("code", "web"), counts, strict=True)) == state.ledger
    assert [each.rows for each in counts] == stream.order.rows_before(NUM_ROWS).tolist()
    assert read_metrics(folder / "killed")[-2]["ledger"] == {name: each.tokens for name, each in state.ledger.items()}


def test_what_was_read_can_not_be_planned_anew(folder, whole):
    done = megascale("train", folder / "whole.yaml", STAGE.replace("6", "2"), "--nproc", "1")
    assert done.returncode == 2
    assert "mixture from row 24, of 108 rows read = 'absent' then, {'code': 10923, 'web': 5461} now" in done.stderr
    assert "mixture from row 72, of 108 rows read = {'code': 10923, 'web': 5461} then, 'absent' now" in done.stderr


def test_each_corpus_has_its_own_validation_loss(whole):
    last = [line for line in read_metrics(whole) if line["kind"] == "eval"][-1]
    corpora = last["corpora"]
    assert set(corpora) == {"code", "web"}
    assert last["num_tokens"] == sum(corpus["num_tokens"] for corpus in corpora.values())
    total = sum(corpus["loss"] * corpus["num_tokens"] for corpus in corpora.values())
    assert last["loss"] == pytest.approx(total / last["num_tokens"], rel=1e-6)
    assert all(corpus["bits_per_byte"] > 0 for corpus in corpora.values())
    assert megascale("report", whole).returncode == 0
    assert "tokens read" in (whole / "report.html").read_text()


def test_the_plan_is_printed_before_training(folder):
    done = megascale("check", write_blend(folder, "checked"), STAGE, "--nproc", "1")
    assert done.returncode == 0, done.stderr
    assert "steps 6 to 8: 36 rows" in done.stdout
    limited = megascale("check", folder / "checked.yaml", "data.corpora.web.max_epochs=0.1", "--nproc", "1")
    assert limited.returncode == 2
    assert "max_epochs" in limited.stderr


@pytest.fixture(scope="module")
def damaged(folder, whole):
    """The corpora, `web` without its second shard. Their rows are counted already, which `whole` needed too."""
    copy = folder / "damaged"
    for name in ("code", "web"):
        shutil.copytree(folder / name, copy / name)
    (copy / "web/train/shard-000001.tar").unlink()
    return copy


def test_bad_shards_are_masked_counted_and_bounded(folder, damaged):
    config = write_blend(folder, "masked", damaged)
    refused = megascale("train", config, "--nproc", "1")
    assert refused.returncode == 2
    assert "web/train/shard-000001.tar can't be opened" in refused.stderr
    limited = megascale("train", config, "data.on_bad_shard=mask", "data.max_masked_rows=1", "--nproc", "2")
    assert limited.returncode != 0
    assert "more than data.max_masked_rows = 1" in limited.stderr
    done = megascale("train", config, "data.on_bad_shard=mask", "--fresh", "--nproc", "2")
    assert done.returncode == 0, done.stderr
    skips = [json.loads(line) for line in (folder / "masked/data_skips.jsonl").read_text().splitlines()]
    assert {(skip["corpus"], skip["shard"].rpartition("/")[2]) for skip in skips} == {("web", "shard-000001.tar")}
    masked = sum(len(skip["rows"]) for skip in skips if skip["step"] <= 9)
    state = state_of(folder / "masked")
    assert state.ledger["web"].masked_rows == masked > 1
    assert state.ledger["code"].masked_rows == 0
    assert state.rows == NUM_ROWS


def test_a_step_without_any_label(folder, whole):
    """All of its rows are masked: no division by their number, and no loss to log."""
    for name in ("code", "web"):
        shutil.copytree(folder / name, folder / "gone" / name)
        for shard in (folder / "gone" / name / "train").glob("*.tar"):
            shard.unlink()
    config = write_blend(folder, "labelless", folder / "gone")
    done = megascale("train", config, "data.on_bad_shard=mask", "train.max_steps=2", "optimizer.warmup_steps=1",
                     "--nproc", "2")
    assert done.returncode == 0, done.stderr
    lines = read_metrics(folder / "labelless")
    assert [line["loss"] for line in lines if line["kind"] == "train"] == [None, None]
    assert lines[-1]["loss"] > 0
    assert sum(counts.masked_rows for counts in state_of(folder / "labelless").ledger.values()) == 24


def test_a_run_streams_from_s3(folder, whole, tmp_path):
    """The corpora in a bucket, fetched into the node's cache: the same rows, the same losses."""
    for name in ("code", "web"):
        shutil.copytree(folder / name, tmp_path / "bucket" / name)
    with serve_s3(tmp_path / "bucket") as bucket:
        config = write_blend(folder, "s3", bucket)
        done = megascale("train", config, STAGE, f"data.cache.folder={tmp_path / 'cache'}", "--nproc", "2")
        assert done.returncode == 0, done.stderr
    state, expected = state_of(folder / "s3"), state_of(whole)
    assert (state.ledger, state.stream_digest) == (expected.ledger, expected.stream_digest)
    pairs = zip(read_metrics(folder / "s3"), read_metrics(whole), strict=True)
    assert all(found["loss"] == pytest.approx(line["loss"], abs=1e-6) for found, line in pairs)
    assert list((tmp_path / "cache").rglob("*.tar"))
