"""The node cache under everything that shakes it: rival processes, kills, a bad network, a full disk."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megascale.config.data import CacheConfig
from megascale.data.cache import ShardCache, open_cache
from megascale.data.manifest import load_manifest
from megascale.data.transfer import Access, FetchStoppedError
from megascale.errors import ConfigError, DataError
from tests.support.corpus import make_corpus
from tests.support.http_server import serve

ROOT = Path(__file__).resolve().parents[2]
ACCESS = Access(attempts=3, timeout_s=5, pause_s=0.001)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("cache") / "corpus", num_documents=400, shard_tokens=1024)


@pytest.fixture
def server(folder):
    with serve(folder) as server:
        yield server


@pytest.fixture
def manifest(server, folder):
    manifest = load_manifest(str(folder), "train")
    manifest.folder = server.url
    return manifest


def start_reader(folder, url, cache_folder, max_bytes, num_opens, seed):
    arguments = map(str, (folder, url, cache_folder, max_bytes, num_opens, seed))
    command = [sys.executable, "-m", "tests.fault.programs.cache_reader", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def taken_bytes(cache_folder):
    """Bytes of all files of the cache, at a moment when none is renamed or given room."""
    with (cache_folder / "lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return sum(path.stat().st_size for path in cache_folder.iterdir() if path.exists())


def open_shard(cache, manifest, shard):
    return cache.open(manifest.shard_place(shard), manifest.shard(shard))


def names(cache):
    return sorted(path.name for path in cache.folder.iterdir())


def fetched(server):
    return [path.rpartition("/")[2] for path, _ in server.requests]


def test_rivals_kills_drops_and_flips(folder, tmp_path):
    """Five processes, 30 % of the connections dropped, 9 % of the bodies flipped, one process killed: no wrong byte.

    Mutations: without the hash check hundreds of opens are wrong; reserving outside of the folder's lock, or leaving
    `.part` files out of the sum, breaks the budget; deleting a `.part` without asking for its lock makes the rename of
    a living process fail.
    """
    sizes = load_manifest(str(folder), "train").table["bytes"]
    max_bytes, peak, cache_folder = int(22 * sizes.max()), 0, tmp_path / "cache"
    assert len(sizes) > 30
    cache_folder.mkdir()
    with serve(folder, drop_fraction=0.3, flip_fraction=0.09) as server:
        readers = [start_reader(folder, server.url, cache_folder, max_bytes, 410, seed) for seed in range(5)]
        victim = start_reader(folder, server.url, cache_folder, max_bytes, 100_000, 5)
        assert victim.stdout.readline() == "first\n"
        while any(reader.poll() is None for reader in readers):
            peak = max(peak, taken_bytes(cache_folder))
            if peak > max_bytes // 2 and victim.poll() is None:
                victim.send_signal(signal.SIGKILL)
            time.sleep(0.005)
        assert victim.wait() == -signal.SIGKILL
        reports = [reader.communicate()[0].split() for reader in readers]
    assert reports == [["first", "410", "0"]] * 5
    assert max_bytes // 2 < peak <= max_bytes
    assert len(server.requests) > 200
    assert {path.suffix for path in cache_folder.iterdir()} == {".tar", ""}


def test_a_killed_fetch_leaves_nothing_in_the_way(folder, server, manifest, tmp_path):
    """Mutation: taking every `.part` for a living one leaves no room for ever."""
    max_bytes = int(manifest.table["bytes"].max())
    server.faults.chunk_pause_s = 30.0
    reader = start_reader(folder, server.url, tmp_path, max_bytes, 1, -1)
    while not any(path.suffix == ".part" and path.stat().st_size for path in tmp_path.iterdir()):
        assert reader.poll() is None
        time.sleep(0.01)
    reader.send_signal(signal.SIGKILL)
    reader.communicate()
    assert len(list(tmp_path.glob("*.part"))) == 1
    server.faults.chunk_pause_s = 0.0
    cache = ShardCache(tmp_path, max_bytes, ACCESS)
    assert names(cache) == ["lock"]
    for shard in (1, 0):
        assert open_shard(cache, manifest, shard)[:] == truth(folder, manifest, shard)
        assert names(cache) == sorted([f"{manifest.shard(shard).sha256}.tar", "lock"])


def truth(folder, manifest, shard):
    return (folder / "train" / manifest.shard(shard).name).read_bytes()


def test_the_next_in_line_takes_over_from_a_killed_one(folder, server, manifest, tmp_path):
    """A process that waits for another's fetch goes on when that one is killed, and reserves the room once.

    Mutation: not giving back the dead one's room waits for it for ever.
    """
    max_bytes = int(manifest.table["bytes"].max())
    server.faults.chunk_pause_s = 30.0
    reader = start_reader(folder, server.url, tmp_path, max_bytes, 1, -1)
    assert server.paused.wait(60)
    server.faults.chunk_pause_s = 0.0
    opened = []
    cache = ShardCache(tmp_path, max_bytes, ACCESS)
    waiter = threading.Thread(target=lambda: opened.append(open_shard(cache, manifest, 0)[:]), daemon=True)
    waiter.start()
    waiter.join(0.2)
    assert waiter.is_alive()
    assert not opened
    reader.send_signal(signal.SIGKILL)
    reader.communicate()
    waiter.join(20)
    assert opened == [truth(folder, manifest, 0)]


def test_those_who_wait_go_on_while_the_first_still_reads(folder, server, manifest, tmp_path):
    """Mutation: leaving the unlocking to the closing of the file keeps them waiting for as long as it is mapped."""
    server.faults.chunk_pause_s = 0.2
    cache, opened = ShardCache(tmp_path, 1 << 20, ACCESS), []
    readers = [
        threading.Thread(target=lambda: opened.append(open_shard(cache, manifest, 0)), daemon=True) for _ in range(4)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(10)
    assert [memory[:] for memory in opened] == [truth(folder, manifest, 0)] * 4
    assert fetched(server) == ["shard-000000.tar"]


def test_a_part_that_changes_hands_while_it_is_tidied_away(tmp_path, monkeypatch):
    """Mutation: deleting by name what was found unlocked takes the file of a living process."""
    part, real = tmp_path / f"{'ab' * 32}.part", fcntl.flock
    part.touch()

    def flock(file, how):
        if file.name == str(part):
            part.unlink()
            part.write_bytes(b"another's")
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    ShardCache(tmp_path, 1 << 20, ACCESS)
    assert part.read_bytes() == b"another's"


def test_the_shard_used_longest_ago_goes_first(server, manifest, tmp_path):
    """Mutation: not marking a use deletes shard 0, the oldest file."""
    sizes = manifest.table["bytes"].tolist()
    cache = ShardCache(tmp_path, sum(sizes[:3]), ACCESS)
    for shard in (0, 1, 2, 0, 3):
        mapped = open_shard(cache, manifest, shard)
        time.sleep(0.01)
    assert {path.stem for path in tmp_path.glob("*.tar")} <= {manifest.shard(n).sha256 for n in (0, 2, 3)}
    assert cache.path(manifest.shard(0)).exists()
    assert len(mapped) == sizes[3]


def test_a_deleted_shard_can_be_read_by_those_who_have_it(folder, server, manifest, tmp_path):
    cache = ShardCache(tmp_path, int(manifest.table["bytes"].max()), ACCESS)
    first = open_shard(cache, manifest, 0)
    open_shard(cache, manifest, 1)
    assert not cache.path(manifest.shard(0)).exists()
    assert first[:] == truth(folder, manifest, 0)


def test_a_fetch_ahead_stands_back(server, manifest, tmp_path):
    """It deletes nothing that is needed sooner, and doesn't wait. Mutation: ignoring `keep` fetches shard 1."""
    cache = ShardCache(tmp_path, int(manifest.table["bytes"].max()), ACCESS)
    for shard, keep in [(0, ()), (1, {manifest.shard(0).sha256})]:
        cache.fetch_ahead(manifest.shard_place(shard), manifest.shard(shard), keep, threading.Event())
    assert fetched(server) == ["shard-000000.tar"]
    assert names(cache) == sorted([f"{manifest.shard(0).sha256}.tar", "lock"])
    stopped = threading.Event()
    stopped.set()
    with pytest.raises(FetchStoppedError):
        cache.fetch_ahead(manifest.shard_place(1), manifest.shard(1), (), stopped)
    assert names(cache) == ["lock"]


def test_a_replaced_shard(folder, server, manifest, tmp_path):
    """Mutation: keeping what was fetched when its hash is wrong gives it out the second time."""
    cache = ShardCache(tmp_path, 1 << 20, ACCESS)
    server.faults.flip_fraction = 1.0
    for _ in range(2):
        with pytest.raises(DataError, match=r"/train/shard-000000\.tar: sha256 .*expected .*, fetched 3 times"):
            open_shard(cache, manifest, 0)
        assert names(cache) == ["lock"]
    server.faults.flip_fraction = 0.0
    assert open_shard(cache, manifest, 0)[:] == truth(folder, manifest, 0)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(manifest, tmp_path, monkeypatch, code):
    cache = ShardCache(tmp_path, 1 << 20, ACCESS)

    def fetch_to_full_disk(place, file, *_):
        file.write(b"the first bytes")
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("megascale.data.cache.fetch_verified", fetch_to_full_disk)
    with pytest.raises(DataError) as caught:
        open_shard(cache, manifest, 0)
    message = str(caught.value)
    for part in (str(tmp_path), f"{manifest.shard(0).bytes} bytes", os.strerror(code), "bytes free", "store: ram"):
        assert part in message
    assert names(cache) == ["lock"]


def test_no_room_by_the_word_of_the_kernel(folder, server, manifest, tmp_path):
    """A limit on the size of files stands for the full disk that a test can't make."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        "from tests.fault.programs.cache_reader import main; main(*sys.argv[1:4], *map(int, sys.argv[4:]))"
    )
    arguments = [str(folder), server.url, str(tmp_path), str(1 << 20), "1", "-1"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    expected = f"DataError: no room for a shard of {manifest.shard(0).bytes} bytes in cache folder {tmp_path} ("
    assert expected in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cache folder .*/file/cache can't be written to \(.*\); give data\.cache"):
        ShardCache(tmp_path / "file" / "cache", 1 << 20, ACCESS)


def test_a_folder_that_is_taken_away(server, manifest, tmp_path):
    cache = ShardCache(tmp_path / "cache", 1 << 20, ACCESS)
    (tmp_path / "cache" / "lock").unlink()
    (tmp_path / "cache").rmdir()
    with pytest.raises(DataError, match=r"cache folder .*/cache can't be used \(.*No such file"):
        open_shard(cache, manifest, 0)


def test_the_default_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert open_cache(CacheConfig(), 1, ACCESS).folder == tmp_path / "home" / ".cache" / "megascale" / "shards"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert open_cache(CacheConfig(), 1, ACCESS).folder == tmp_path / "xdg" / "megascale" / "shards"
