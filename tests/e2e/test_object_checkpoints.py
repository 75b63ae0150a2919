"""Runs whose checkpoints go to an object store: killed, resumed, read from and begun anew as with a run folder."""

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from megascale.checkpoint.run_file import peek_run_store
from tests.support.faulty_run import NUM_STEPS, child_pids, send_signal, wait_until
from tests.support.s3_server import serve_s3
from tests.support.tiny_run import curve, megascale, start_megascale, write_config


@pytest.fixture(scope="module")
def bucket(tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("bucket")
    (folder / "other").write_text("of somebody else")
    with serve_s3(folder, "models") as url:
        yield url


@pytest.fixture(scope="module")
def killed(corpus, bucket, tmp_path_factory) -> Path:
    """A run that was killed, all its processes, once it had a checkpoint, and finished by the same command: its folder.
    """
    folder = tmp_path_factory.mktemp("killed")
    config, url = write_config(folder, corpus), f"checkpoint.url={bucket}/runs"
    run = start_megascale("train", config, url, "--nproc", "2")
    try:
        wait_until(lambda: (folder / "run" / "run.json").exists() and peek_run_store(folder / "run").steps())
    finally:
        for pid in [run.pid, *child_pids(run.pid)]:  # the writers die with their ranks
            send_signal(pid, signal.SIGKILL)
        run.communicate()
    steps = peek_run_store(folder / "run").steps()
    assert 0 < steps[-1] < NUM_STEPS
    done = megascale("train", config, url, "--nproc", "2")
    assert done.returncode == 0, done.stderr
    assert f"resuming from {bucket}/runs/" in done.stdout
    assert f"at step {steps[-1]}" in done.stdout
    return folder / "run"


def test_a_killed_run_resumes_from_the_store_and_ends_as_if_nobody_had_killed_it(killed, clean):
    assert curve(killed) == curve(clean)
    assert not (killed / "checkpoints").exists()
    store = peek_run_store(killed)
    assert store.steps() == [6, 9, 12]
    for name in ("rank_00000.safetensors", "rank_00001.safetensors"):
        with store.open(12, name) as file:
            assert file.read(0, file.size_bytes) == (clean / "checkpoints" / "step_00000012" / name).read_bytes()


def test_commands_beside_the_run_read_from_the_store(killed, corpus):
    written = megascale("generate", killed, "--prompt", "1 2 3", "--max-tokens", "4")
    assert written.returncode == 0, written.stderr
    audited = megascale("data", "audit", killed)
    assert audited.returncode == 0, audited.stderr


@pytest.mark.slow
def test_a_fresh_start_leaves_the_earlier_place_as_it_is(killed, corpus, bucket, tmp_path):
    """Mutation seen to be caught: the place without the run's id."""
    copy = tmp_path / "run"
    shutil.copytree(killed, copy)
    earlier = peek_run_store(copy)
    config = write_config(tmp_path, corpus)
    done = megascale(
        "train", config, f"checkpoint.url={bucket}/runs", "train.max_steps=3", "--fresh", "--nproc", "2",
    )
    assert done.returncode == 0, done.stderr
    assert earlier.steps() == [6, 9, 12]
    later = peek_run_store(copy)
    assert (later.steps(), later.place == earlier.place) == ([3], False)
    set_aside, = (copy / "set_aside").iterdir()
    assert json.loads((set_aside / "run.json").read_text())["run_id"] == earlier.place.rpartition("/")[2]


def test_a_store_that_can_not_be_written_to_stops_the_start(corpus, bucket, tmp_path):
    config = write_config(tmp_path, corpus)
    done = megascale("train", config, "checkpoint.url=s3://nobodys/runs", "--nproc", "1")
    assert done.returncode == 2
    assert "no such object, or no such bucket: 's3://nobodys/runs/" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
