"""Retention that keeps one checkpoint, under SIGKILL: at every instant there is one that is whole.

A watcher process lists and verifies all the time, without a pause, while a saver process saves as fast as it can and is
killed again and again. What the watcher demands: the list of checkpoints is never empty, and as long as it doesn't
change, one of its checkpoints verifies. A list that did change under its eyes says nothing and is looked at again.
"""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from megascale.checkpoint.comm import LocalComm
from megascale.checkpoint.find import find_checkpoint, verify_checkpoint
from megascale.checkpoint.folders import list_steps
from megascale.checkpoint.local_store import LocalStore
from megascale.checkpoint.retention import Retention
from megascale.checkpoint.save import save_checkpoint
from megascale.errors import CheckpointError
from tests.support.checkpoint_ranks import RUN, cut_flat, make_tensors, save_all, state_at
from tests.support.corpus import make_corpus
from tests.support.file_faults import FileCalls, watched_files
from tests.support.tiny_run import start_megascale, write_config

PIECES, = cut_flat(make_tensors({"master/a": (300, 100), "exp_avg/a": (300, 100)}), [])
LONGEST_LIFE = 130
"""File operations after which a saver is dead: 3 saves and their deletions."""


def save_until_killed(folder: Path, at: int) -> None:
    """What a restarted job does, with one save right after the other, until SIGKILL at a file operation."""
    with watched_files(FileCalls(at, lambda *_: os.kill(os.getpid(), signal.SIGKILL))):
        step = find_checkpoint(LocalStore(folder), run_id="run-a", comm=LocalComm()).step
        while True:
            step += 1
            save_checkpoint(
                LocalStore(folder), RUN, state_at(step), PIECES, comm=LocalComm(), retention=Retention(last=1)
            )


def watch(folder: Path, stop: Path, report: Path) -> None:
    """Looks until `stop` appears; writes how often each verdict was reached, and what was wrong."""
    counts = {"whole": 0, "changed": 0, "last_step": 0, "problem": None}
    while not stop.exists() and not counts["problem"]:
        steps = list_steps(folder)
        reasons = [] if steps else ["no checkpoint is there"]
        whole = next((step for step in reversed(steps) if verifies(folder, step, reasons)), None)
        if whole is not None:
            counts["whole"] += 1
            counts["last_step"] = whole
        elif not steps or list_steps(folder) == steps:
            counts["problem"] = "; ".join(reasons)
        else:
            counts["changed"] += 1
    report.write_text(json.dumps(counts))


def verifies(folder: Path, step: int, reasons: list[str]) -> bool:
    try:
        verify_checkpoint(LocalStore(folder), step)
    except (CheckpointError, OSError) as error:  # also when it was deleted between two looks
        reasons.append(str(error))
        return False
    return True


def start_forked(body, *arguments) -> int:
    """Runs the body in a child process; gives its pid."""
    child = os.fork()
    if child == 0:
        try:
            body(*arguments)
        finally:
            os._exit(1)
    return child


def check_kills(folder: Path, num_kills: int, seed: int) -> dict:
    """Kills a saver so many times under the eyes of a watcher; gives the watcher's report."""
    save_all(folder / "run", 1, [PIECES], keep_last=1)
    stop, report = folder / "stop", folder / "report.json"
    watcher, chance = start_forked(watch, folder / "run", stop, report), random.Random(seed)
    try:
        for _ in range(num_kills):
            saver = start_forked(save_until_killed, folder / "run", chance.randint(1, LONGEST_LIFE))
            _, status = os.waitpid(saver, 0)
            assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL  # it always found a checkpoint to go on from
    finally:
        stop.touch()
        os.waitpid(watcher, 0)
    return json.loads(report.read_text())


def check_report(report: dict, num_kills: int) -> None:
    assert report["problem"] is None
    assert report["whole"] >= num_kills
    assert report["last_step"] > num_kills // 2  # the savers got somewhere


def test_a_whole_checkpoint_is_there_at_every_instant(tmp_path):
    """Mutation: deleting before the draft is committed (`retire` with `last=0` in front of `draft.commit()`)."""
    check_report(check_kills(tmp_path, 20, seed=1), 20)
    assert len(list_steps(tmp_path / "run")) in (1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_many_kills(tmp_path, seed):
    """Mutation: as above."""
    check_report(check_kills(tmp_path, 200, seed), 200)


@pytest.mark.slow
def test_a_training_that_is_killed_and_saves_beside_each_step(tmp_path):
    """The whole thing, with a writer process beside the rank, that saves slower than the steps go.

    Mutation: as above.
    """
    corpus = make_corpus(tmp_path / "corpus", vocab_size=64)
    config = write_config(tmp_path, corpus)
    arguments = ("train", config, "--nproc", "1", "checkpoint.interval_steps=1", "checkpoint.keep_last=1",
                 "train.max_steps=100000", "optimizer.horizon_steps=100000")
    stop, report = tmp_path / "stop", tmp_path / "report.json"
    watcher, chance = None, random.Random(5)
    try:
        for _ in range(3):
            run = start_megascale(*arguments)
            deadline = time.monotonic() + 120
            before = max(list_steps(tmp_path / "run"), default=0)
            while max(list_steps(tmp_path / "run"), default=0) <= before and time.monotonic() < deadline:
                time.sleep(0.05)
            watcher = watcher or start_forked(watch, tmp_path / "run", stop, report)
            time.sleep(chance.uniform(0.1, 1))
            run.kill()
            run.communicate()
    finally:
        stop.touch()
        if watcher:
            os.waitpid(watcher, 0)
    check_report(json.loads(report.read_text()), 3)
    shutil.rmtree(tmp_path / "run")
