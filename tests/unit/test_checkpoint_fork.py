"""Beginning a run with another run's checkpoint: the source is only read, and each way it can be wrong has words."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megascale.checkpoint.comm import LocalComm
from megascale.checkpoint.find import VerifiedCheckpoint, read_stored_index
from megascale.checkpoint.fork import ForkSource, check_begun_by, check_not_itself, describe_turn, open_fork, parse_fork
from megascale.checkpoint.index import Change, LineageRecord
from megascale.checkpoint.local_store import LocalStore
from megascale.checkpoint.records import to_json
from megascale.checkpoint.run_file import RunFile
from megascale.errors import CheckpointError, ConfigError
from megascale.train.start_options import StartOptions
from tests.support.checkpoint_ranks import RUN, cut_flat, make_tensors, run_ranks, save_all


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """A run with checkpoints of steps 2 and 4."""
    folder = tmp_path / "source"
    ranks = cut_flat(make_tensors({"master/a": (3, 4)}), [500_000])
    for step in (2, 4):
        assert not any(isinstance(result, Exception) for result in save_all(folder, step, ranks))
    (folder / "run.json").write_bytes(to_json(asdict(RunFile("run-a", 0, None))))
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("text", "place", "step"),
    [
        ("/runs/a@200", "/runs/a", 200), ("/runs/a", "/runs/a", None), ("/runs/a@b", "/runs/a@b", None),
        ("/runs/a@b@7", "/runs/a@b", 7), ("s3://me@bucket/runs/1f", "s3://me@bucket/runs/1f", None),
        ("s3://bucket/runs/1f/@12", "s3://bucket/runs/1f", 12), ("/runs/a@²", "/runs/a@²", None),
    ],
)
def test_a_source_is_a_place_and_a_step(text, place, step):
    assert parse_fork(text) == ForkSource(place, step)


def test_a_step_without_a_run_is_refused():
    with pytest.raises(ConfigError, match="RUN@STEP"):
        parse_fork("@200")


def test_a_run_is_not_forked_into_its_own_folder(tmp_path, run_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="own folder"):
        check_not_itself(parse_fork("source@2"), run_folder)
    (tmp_path / "link").symlink_to(run_folder)
    with pytest.raises(ConfigError, match="own folder"):
        check_not_itself(parse_fork("link@2"), run_folder)
    check_not_itself(parse_fork("source@2"), tmp_path / "other")


def test_the_step_asked_for_or_the_newest_whole_one_is_found_and_nothing_is_moved(run_folder):
    """A damaged newest checkpoint is passed over, by two ranks alike, and left where it is.

    Mutation seen to be caught: the newest is taken whatever step was asked for.
    """
    source = parse_fork(str(run_folder))
    assert open_fork(source, "new", LocalComm()).step == 4
    assert open_fork(replace(source, step=2), "new", LocalComm()).step == 2
    path = run_folder / "checkpoints/step_00000004/rank_00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    before = snapshot(run_folder)
    found = run_ranks(2, lambda comm: open_fork(source, "new", comm).step)
    assert found == [2, 2]
    with pytest.raises(CheckpointError, match=r"(?s)step 4; there are those of steps 2, 4.*rank_00001"):
        open_fork(replace(source, step=4), "new", LocalComm())
    assert snapshot(run_folder) == before


def test_a_source_that_is_not_there(tmp_path, run_folder):
    with pytest.raises(CheckpointError, match="no whole checkpoint of step 3; there are those of steps 2, 4"):
        open_fork(parse_fork(f"{run_folder}@3"), "new", LocalComm())
    with pytest.raises(CheckpointError, match="is no run folder"):
        open_fork(parse_fork(str(tmp_path / "nothing")), "new", LocalComm())
    with pytest.raises(CheckpointError, match="this very run"):
        open_fork(parse_fork(str(run_folder)), "run-a", LocalComm())


def own(run_folder: Path, *lineage: LineageRecord) -> VerifiedCheckpoint:
    store = LocalStore(run_folder)
    index = read_stored_index(store, 4)
    return VerifiedCheckpoint(store, replace(index, run=replace(index.run, lineage=lineage)))


def test_a_run_with_checkpoints_must_have_begun_with_this_fork(run_folder):
    """Mutation seen to be caught: any run that was ever forked passes."""
    turn = LineageRecord("fork", 2, "/runs/b", "run-b", ())
    later = LineageRecord("changed", 3, "/runs/b", "run-b", ())
    for text in ("/runs/b@2", "/runs/b"):
        check_begun_by(parse_fork(text), own(run_folder, turn, later))
    for text, lineage in (("/runs/b@3", (turn, later)), ("/runs/c@2", (turn,)), ("/runs/b@2", ())):
        with pytest.raises(CheckpointError, match="didn't begin with --fork"):
            check_begun_by(parse_fork(text), own(run_folder, *lineage))


def test_turns_are_told_in_a_line():
    assert describe_turn(RUN.lineage[0]) == (
        "forked from runs/b at step 2: optimizer.learning_rate = 0.1 then, 0.2 now"
    )
    assert describe_turn(LineageRecord("import", 0, "gpt2", None, ())) == "weights of gpt2"
    turn = LineageRecord("changed", 7, "runs/a", "a", (Change("run.seed", 1, 2),))
    assert describe_turn(turn) == "changed at step 7: run.seed = 1 then, 2 now"


@pytest.mark.parametrize("options", [StartOptions(), StartOptions(True, "runs/a@2", ("run.seed", "optimizer.eps"))])
def test_options_reach_the_ranks(options):
    assert StartOptions.from_arguments(["train.max_steps=3", *options.to_arguments()]) == options
