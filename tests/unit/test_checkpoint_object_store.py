"""What both kinds of store promise, by the same tests: a run folder, and an S3 server on this machine. Then what is
special to object stores: every request that fails, ranges, urls.
"""

import contextlib
import errno
import hashlib
import random
import sys
import threading
from collections.abc import Callable, Iterator

import fsspec
import pytest
from aiobotocore.client import AioBaseClient
from s3fs import S3FileSystem

from megascale.checkpoint import object_store
from megascale.checkpoint.comm import LocalComm
from megascale.checkpoint.find import DamagedCheckpointError, find_checkpoint, peek_checkpoint
from megascale.checkpoint.load import fill_pieces, load_pieces
from megascale.checkpoint.object_store import ObjectStore, check_url
from megascale.checkpoint.retention import Retention
from megascale.checkpoint.save import save_checkpoint
from megascale.checkpoint.store import Store, is_url, open_store
from megascale.checkpoint.writer import ProcessWriter
from megascale.data.object_store import open_file_system
from megascale.errors import CheckpointError, SaveError
from tests.support.checkpoint_ranks import (
    RUN,
    cut_columns,
    cut_flat,
    equal_bits,
    make_tensors,
    run_ranks,
    state_at,
    zeros_like,
)
from tests.support.s3_server import serve_s3

SHAPES = {"master/a": (7, 5), "exp_avg/a": (7, 5), "master/b": ()}
STATES = {step: cut_flat(make_tensors(SHAPES, seed=step), [400_000]) for step in (3, 6, 9, 12)}
TWO = Retention(2)
CHANGING = {"PutObject", "DeleteObject", "DeleteObjects", "CompleteMultipartUpload"}
DAMAGES = {
    "flipped": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    "cut": lambda content: content[:-1],
    "empty": lambda content: b"",
    "longer": lambda content: content + b"\0",
    "missing": None,
}


@pytest.fixture(scope="module")
def bucket(tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("bucket")
    (folder / "other").write_text("of somebody else")
    with serve_s3(folder, "models") as url, pytest.MonkeyPatch.context() as patch:
        shared = open_file_system("s3")  # else fsspec makes one for every thread, slowly
        patch.setattr(object_store, "open_file_system", lambda name: shared if name == "s3" else open_file_system(name))
        yield url


@pytest.fixture
def remote(bucket, request) -> str:
    """A place in the bucket that no other test uses."""
    return f"{bucket}/runs/{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]}"


@pytest.fixture(params=["folder", "s3"])
def place(request, tmp_path) -> str:
    """A run folder, or a place in the bucket."""
    return str(tmp_path / "run") if request.param == "folder" else request.getfixturevalue("remote")


def save(place: str, step: int, retention: Retention = TWO) -> list:
    """Saves with two threads as ranks; gives each one's path or exception."""
    if not is_url(place):
        fsspec.filesystem("file").makedirs(place, exist_ok=True)
    ranks = STATES[step]
    return run_ranks(len(ranks), lambda comm: save_checkpoint(
        open_store(place), RUN, state_at(step), ranks[comm.rank], comm=comm, retention=retention,
    ))


def find(place: str):
    return find_checkpoint(open_store(place), run_id=RUN.run_id, comm=LocalComm())


def files_of(place: str) -> list[str]:
    """Every file below a place, relative to it."""
    system, root = fsspec.url_to_fs(place)
    system.invalidate_cache()
    return sorted(path.removeprefix(f"{root}/") for path in system.find(root))


def damage(store: Store, step: int, name: str, change: Callable[[bytes], bytes] | None) -> None:
    """Changes or removes a file of a checkpoint."""
    store.size_bytes(step, name)
    system, path = fsspec.url_to_fs(f"{store.path(step)}/{name}")
    content = system.cat_file(path)
    system.rm_file(path)
    if change is not None:
        system.pipe_file(path, change(content))


def check_loads(checkpoint, step: int) -> None:
    """In another layout than was saved: three ranks by columns."""
    wanted = cut_columns(make_tensors(SHAPES, seed=step), 3)
    loaded = zeros_like(wanted)
    assert run_ranks(3, lambda comm: load_pieces(checkpoint, loaded[comm.rank], comm=comm)) == [None] * 3
    assert equal_bits(loaded, wanted)
    assert checkpoint.index.state == state_at(step)


def test_the_newest_is_found_and_loaded_in_another_layout(place):
    assert open_store(place).steps() == []
    for step in (3, 6):
        save(place, step)
    found = find(place)
    assert (found.step, found.rejected) == (6, ())
    check_loads(found, 6)
    check_loads(peek_checkpoint(open_store(place), step=3), 3)
    with pytest.raises(FileNotFoundError), open_store(place).open(4, "index.json"):
        pass


@pytest.mark.parametrize(
    ("kind", "name"),
    [*((kind, "rank_00001.safetensors") for kind in DAMAGES), ("flipped", "index.json"), ("missing", "SHA256SUMS")],
)
def test_a_damaged_one_is_put_away_with_the_reason_and_the_one_before_is_taken(place, kind, name):
    """Mutation seen to be caught: `is_whole` of the object store compares sizes only."""
    for step in (3, 6):
        save(place, step)
    damage(open_store(place), 6, name, DAMAGES[kind])
    found = find(place)
    assert found.step == 3
    assert "step_00000006" in found.rejected[0]
    check_loads(found, 3)
    again = find(place)
    assert (again.step, again.rejected, again.store.steps()) == (3, (), [3])
    assert again.store.has_quarantine()
    reason, = [name for name in files_of(place) if name.startswith("quarantine/") and name.endswith(".txt")]
    assert fsspec.open(f"{place}/{reason}", "rt").open().read() == f"{found.rejected[0]}\n"
    save(place, 6)  # trained again from 3
    check_loads(find(place), 6)


def test_without_a_whole_one_the_run_never_starts_silently_at_step_0(place):
    save(place, 3)
    damage(open_store(place), 3, "rank_00000.safetensors", None)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"no whole checkpoint is left to resume from(?s:.)*--fresh"):
            find(place)


def test_retention_and_a_step_is_saved_once(place):
    """Mutation seen to be caught: `delete` of the object store removes the mark only."""
    for step in (3, 6, 9, 12):
        save(place, step, Retention(1, every_steps=6))
    assert open_store(place).steps() == [6, 12]
    before = files_of(place)
    assert {name.split("/")[1][:13] for name in before if name.startswith("checkpoints/")} == \
        {"step_00000006", "step_00000012"}
    save(place, 12, Retention(1, every_steps=6))
    assert files_of(place) == before


def test_a_draft_is_invisible_and_removed_by_the_next_but_for_its_own_token(place):
    save(place, 3)
    store = open_store(place)
    for token in ("aa", "bb"):
        store.draft(6, token).write("rank_00000.safetensors", [b"half"])
    assert store.steps() == [3]
    store.prepare("aa")
    drafts = [name for name in files_of(place) if "step_00000006" in name]
    assert len(drafts) == 1
    assert "aa" in drafts[0]
    assert find(place).step == 3
    assert not [name for name in files_of(place) if "step_00000006" in name]


def test_a_dead_jobs_late_writes_do_not_touch_a_committed_checkpoint(place):
    """Both jobs write step 6, the dead one goes on after the other's commit, even to its own commit.

    Mutation seen to be caught: no token in the names of the object store.
    """
    save(place, 3)
    store = open_store(place)
    ghost = store.draft(6, "0000")
    ghost.write("rank_00000.safetensors", [b"a part of"])
    other = open_store(place).draft(6, "ffff")
    record = other.write("rank_00001.safetensors", [b"mine"])
    other.commit()
    with contextlib.suppress(OSError):
        ghost.write("rank_00001.safetensors", [b"and the end"])
    assert store.is_whole(6, "rank_00001.safetensors", record)
    with contextlib.suppress(OSError):
        ghost.commit()
    names = {name.split("/")[1] for name in files_of(place) if name.startswith("checkpoints/step_00000006")}
    assert len(names) == 2
    found = find(place)  # neither is a checkpoint
    assert found.step == 3
    assert len(found.rejected) == 2 - (not is_url(place))


def test_a_process_beside_the_rank_writes_it(place):
    """Mutation seen to be caught: listings that fsspec has kept are believed, so that this process sees no new step."""
    save(place, 3)
    store, writer = open_store(place), ProcessWriter()
    assert store.steps() == [3]
    try:
        save_checkpoint(
            store, RUN, state_at(6), cut_flat(make_tensors(SHAPES, seed=6), [])[0], comm=LocalComm(), retention=TWO,
            writer=writer,
        )
    finally:
        writer.close()
    assert store.steps() == [3, 6]
    check_loads(find(place), 6)


def test_chunks_larger_than_a_part_and_files_of_many_ranges(remote, monkeypatch):
    """Mutation seen to be caught: the last range of a batch one byte short."""
    for name, size_bytes in (("PART_BYTES", 5 << 20), ("SLICE_BYTES", 3 << 19), ("RANGE_BYTES", 1_000_003)):
        monkeypatch.setattr(object_store, name, size_bytes)
    content = random.Random(0).randbytes(12_345_678)
    draft = ObjectStore(remote).draft(1, "aa")
    record = draft.write("rank_00000.safetensors", [content[:100], memoryview(content)[100:], b""])
    assert (record.bytes, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert draft.is_whole("rank_00000.safetensors", record)
    assert draft.read_small("rank_00000.safetensors", len(content)) == content
    assert draft.read_small("rank_00000.safetensors", len(content) - 1) is None
    draft.commit()
    with ObjectStore(remote).open(1, "rank_00000.safetensors") as file:
        for start, stop in ((0, 8), (8, 90), (5_000_000, 9_500_001), (5_000_002, 5_000_003), (12_345_000, 1 << 40)):
            assert bytes(file.read(start, stop)) == content[start:stop]
        assert file.read(7, 7) == file.read(1 << 40, 1 << 41) == b""


def test_only_the_bytes_that_are_wanted_are_fetched(remote, monkeypatch):
    """One small tensor of four, between large ones. Mutation seen to be caught: the file is fetched as a whole."""
    monkeypatch.setattr(object_store, "READ_AHEAD_BYTES", 1 << 10)
    shapes = {"master/a": (512, 1024), "master/b": (30, 10), "master/c": (512, 1024), "master/d": (6,)}
    tensors = make_tensors(shapes)
    save_checkpoint(
        ObjectStore(remote), RUN, state_at(3), cut_flat(tensors, [])[0], comm=LocalComm(), retention=Retention(1),
    )
    wanted = cut_columns({"master/b": tensors["master/b"]}, 1)
    checkpoint, loaded, fetched = peek_checkpoint(ObjectStore(remote)), zeros_like(wanted), []
    real = S3FileSystem._cat_file

    async def counting(self, path, **options):
        content = await real(self, path, **options)
        fetched.append(len(content))
        return content

    monkeypatch.setattr(S3FileSystem, "_cat_file", counting)
    fill_pieces(checkpoint, loaded[0])
    assert equal_bits(loaded, wanted)
    assert 1200 <= sum(fetched) < 8192


class Requests:
    """Counts the requests that change the store, and spoils one of them; `is_dead`: and all requests after it."""

    def __init__(self, at: int, *, is_carried_out: bool, is_dead: bool):
        self.count, self._at, self._is_carried_out, self._is_dead = 0, at, is_carried_out, is_dead
        self._guard = threading.Lock()

    @contextlib.contextmanager
    def watched(self) -> Iterator["Requests"]:
        real = AioBaseClient._make_api_call

        async def call(client, operation, parameters):
            with self._guard:
                is_past = self.count >= self._at > 0
                self.count += operation in CHANGING
                is_at = operation in CHANGING and self.count == self._at
            if self._is_dead and is_past:
                raise OSError(errno.EIO, "the machine is gone")
            if is_at and not self._is_carried_out:
                raise OSError(errno.EIO, "the server is away")
            answer = await real(client, operation, parameters)
            if is_at:
                raise OSError(errno.EIO, "no answer")
            return answer

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AioBaseClient, "_make_api_call", call)
            yield self


@pytest.mark.parametrize(
    ("is_carried_out", "is_dead"), [(False, False), (True, False), (True, True)],
    ids=["not carried out", "answer lost", "dead from then on"],
)
def test_every_changing_request_of_a_save_that_fails(remote, is_carried_out, is_dead):
    """All of them, one save each: afterwards the old or the new checkpoint is whole, and nothing has to be tidied.

    Mutations seen to be caught: the mark is put down before the index is written; a failed commit's files are removed
    without its mark.
    """
    with Requests(0, is_carried_out=False, is_dead=False).watched() as requests:
        save(f"{remote}/count", 3)
        requests.count = 0
        save(f"{remote}/count", 6, Retention(1))
    last, steps = requests.count, []
    for at in range(1, last + 1):
        place = f"{remote}/{at}"
        save(place, 3)
        with Requests(at, is_carried_out=is_carried_out, is_dead=is_dead).watched() as requests:
            outcomes = save(place, 6, Retention(1))
        assert requests.count >= at
        found = find(place)
        assert found.rejected == ()
        steps.append(found.step)
        loaded = zeros_like(cut_flat(make_tensors(SHAPES), []))
        load_pieces(found, loaded[0], comm=LocalComm())
        assert equal_bits(loaded, cut_flat(make_tensors(SHAPES, seed=found.step), []))
        if isinstance(outcomes[0], Exception):
            assert {type(outcome) for outcome in outcomes} == {SaveError}
            assert "where space has no limit. The earlier checkpoints are untouched" in str(outcomes[0])
        else:
            assert found.step == 6
        save(place, 9, Retention(1))
        assert {name.split("/")[1][:13] for name in files_of(place) if "/step_" in name} == {"step_00000009"}
    assert steps.count(3) >= 8
    assert 1 <= steps.count(6) <= 8


def test_a_server_that_is_away_is_no_damage(remote, monkeypatch):
    """Mutation seen to be caught: the EIO of the package passed on, for which find puts a whole checkpoint away."""
    for step in (3, 6):
        save(remote, step)

    async def away(*_, **__):
        raise OSError(errno.EIO, "the server is away")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3FileSystem, "_cat_file", away)
        with pytest.raises(CheckpointError, match="the server is away") as refused:
            find(remote)
    assert not isinstance(refused.value, DamagedCheckpointError)
    assert find(remote).step == 6


def test_a_bucket_that_is_missing_stops_the_start(bucket):
    with pytest.raises(CheckpointError, match=r"no such bucket.*s3://nobodys/run-a/README.txt"):
        find("s3://nobodys/run-a")


@pytest.mark.parametrize(
    "url", ["s3://user:secret@bucket/runs", "s3://bucket/runs?key=secret", "https://host/secret", "s3://bucket/a*secret",
            "s3://", "s3:///secret", "s3://bucket/../secret", "s3://bucket//secret", "file:///secret"],
)
def test_urls_that_are_refused(url):
    with pytest.raises(CheckpointError, match="write BUCKET/FOLDER after one of s3://, gs://, az://") as refused:
        check_url(url)
    assert "secret@" not in str(refused.value)
    assert "key=" not in str(refused.value)


def test_a_store_whose_package_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(CheckpointError, match=r"gs:// is read by the package gcsfs .*pip install gcsfs"):
        open_store("gs://bucket/runs")
