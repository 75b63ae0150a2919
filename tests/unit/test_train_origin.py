"""What a session begins with: the run's own newest checkpoint, else the one it forks; and what its lineage then tells.

Mutations seen to be caught: the checkpoint's lineage isn't carried over; a turn is added at every restart; a run with
checkpoints of its own forks again; a forked checkpoint taken for one of the run's own.
"""

from dataclasses import asdict, replace

import pytest

from megascale.checkpoint.comm import LocalComm
from megascale.checkpoint.fork import parse_fork
from megascale.checkpoint.local_store import LocalStore
from megascale.checkpoint.records import to_json
from megascale.checkpoint.run_file import RunFile, note_saved
from megascale.config.batch_plan import constant_batch
from megascale.errors import CheckpointError
from megascale.train.origin import find_origin
from tests.support.checkpoint_ranks import RUN, cut_flat, make_tensors, save_all

RANKS = cut_flat(make_tensors({"master/a": (3, 4)}), [])


def run_at(folder, rate: float, run_id: str, lineage=()):
    config = {"run": {"folder": str(folder)}, "optimizer": {"learning_rate": rate}}
    return replace(RUN, run_id=run_id, config=config, lineage=lineage)


def save(folder, step: int, run) -> None:
    result, = save_all(folder, step, RANKS, run=run)
    assert not isinstance(result, Exception), result
    (folder / "run.json").write_bytes(to_json(asdict(RunFile(run.run_id, 0, None))))


def begin(folder, run, *, fork=None, allowed=()):
    return find_origin(LocalStore(folder), run, constant_batch(8), LocalComm(), fork, allowed)


def test_an_allowed_change_is_told_once_over_restarts(tmp_path, capsys):
    folder = tmp_path / "a"
    save(folder, 2, run_at(folder, 0.1, "a", RUN.lineage))
    with pytest.raises(CheckpointError, match=r"--allow-change optimizer\.learning_rate"):
        begin(folder, run_at(folder, 0.2, "a"))
    for _ in range(2):  # the second start finds the checkpoint of before the change still
        first = begin(folder, run_at(folder, 0.2, "a"), allowed=("optimizer.learning_rate",))
        assert first.lineage == (*RUN.lineage, first.news)
        assert (first.news.kind, first.news.step, first.news.run_id) == ("changed", 2, "a")
        assert "optimizer.learning_rate = 0.1 then, 0.2 now, allowed" in capsys.readouterr().out
    save(folder, 4, run_at(folder, 0.2, "a", first.lineage))
    again = begin(folder, run_at(folder, 0.2, "a"), allowed=("optimizer.learning_rate",))
    assert (again.lineage, again.news, again.saved_step) == (first.lineage, None, 4)


def test_a_fork_begins_at_its_source_and_goes_on_with_itself(tmp_path):
    source, folder = tmp_path / "a", tmp_path / "b"
    for step in (2, 4):
        save(source, step, run_at(source, 0.1, "a"))
    fork = parse_fork(f"{source}@2")
    first = begin(folder, run_at(folder, 0.1, "b"), fork=fork)
    assert (first.checkpoint.step, first.is_fork, first.saved_step) == (2, True, None)
    assert (first.news.kind, first.news.source, first.news.run_id, first.news.changes) == ("fork", str(source), "a", ())
    save(folder, 3, run_at(folder, 0.1, "b", first.lineage))
    again = begin(folder, run_at(folder, 0.1, "b"), fork=fork)
    assert (again.checkpoint.step, again.is_fork, again.saved_step, again.lineage) == (3, False, 3, first.lineage)
    with pytest.raises(CheckpointError, match="didn't begin with --fork"):
        begin(folder, run_at(folder, 0.1, "b"), fork=parse_fork(f"{source}@4"))


def test_a_run_without_checkpoints_begins_at_step_0(tmp_path):
    assert begin(tmp_path, run_at(tmp_path, 0.1, "a"), allowed=("run.seed",)).checkpoint is None


def test_a_run_that_has_saved_does_not_begin_at_step_zero(tmp_path):
    """Mutation: leaving out the look at what the run folder notes."""
    run = run_at(tmp_path, 0.1, "a")
    assert begin(tmp_path, run).checkpoint is None
    note_saved(tmp_path, 4)
    with pytest.raises(CheckpointError, match="holds no checkpoint, though this run saved one at step 4"):
        begin(tmp_path, run)
