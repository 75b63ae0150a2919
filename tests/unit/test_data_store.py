"""The stores: the same arrays from each, bounded, fetched ahead of use, and whole whatever happens to a copy."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from megascale.config.data import DataConfig
from megascale.data.manifest import load_manifest
from megascale.data.open_shards import FetchThread, OpenShards
from megascale.data.store import CacheStore, MapStore, RamStore, open_store
from megascale.data.transfer import Access, access_of
from megascale.errors import ConfigError, DataError
from tests.support.corpus import make_corpus
from tests.support.http_server import serve
from tests.support.s3_server import serve_s3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("store") / "corpus")


@pytest.fixture
def server(folder):
    with serve(folder) as server:
        yield server


@pytest.fixture
def settings(tmp_path):
    """Makes the data section for a place."""

    def make(place, max_gib=1.0, shards_ahead=4, **more):
        cache = {"folder": str(tmp_path / "cache"), "max_gib": max_gib, "shards_ahead": shards_ahead}
        return DataConfig.model_validate({"folder": str(place), "cache": cache, "fetch_attempts": 2, **more})

    return make


def open_at(place, data):
    manifest = load_manifest(str(place), "train", access_of(data))
    return manifest, open_store(manifest, data)


def tokens_of(manifest, store):
    return [store.open(n).read(0, tokens).tolist() for n, tokens in enumerate(manifest.table["tokens"].tolist())]


def names(server):
    return [path.rpartition("/")[2] for path, _ in server.requests if path.endswith(".tar")]


def wait_for(condition):
    """Waits for a thread of the store."""
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")


def test_every_store_gives_the_same_arrays(folder, server, settings, tmp_path):
    """Mutation: naming cached files by their file names in place of their hashes leaves 4 files, not 8."""
    other = make_corpus(folder.parent / "other", seed=1)
    with serve(other) as other_server, serve_s3(folder) as bucket:
        for place, truth, more, kind in [
            (folder, folder, {}, MapStore),
            (server.url, folder, {}, CacheStore),
            (other_server.url, other, {}, CacheStore),
            (bucket, folder, {}, CacheStore),
            (f"pipe:cat {other}/{{}}", other, {"allow_commands": True}, CacheStore),
            (folder, folder, {"store": "ram"}, RamStore),
            (server.url, folder, {"store": "ram"}, RamStore),
            (bucket, folder, {"store": "ram"}, RamStore),
            (f"pipe:cat {other}/{{}}", other, {"allow_commands": True, "store": "ram"}, RamStore),
        ]:
            manifest, store = open_at(place, settings(place, **more))
            assert type(store) is kind
            for number, tokens in enumerate(manifest.table["tokens"].tolist()):
                found = store.open(number).read(0, tokens)
                local = MapStore(load_manifest(str(truth), "train")).open(number)
                assert found.dtype == np.uint16
                assert found.tolist() == local.read(0, tokens).tolist()
                assert store.open(number).table == local.table
            assert not store.open(0).block_tokens(0).flags.writeable
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 8


def test_a_cached_shard_is_not_fetched_again(server, settings):
    manifest, store = open_at(server.url, settings(server.url))
    assert tokens_of(manifest, store) == tokens_of(*open_at(server.url, settings(server.url)))
    assert len(names(server)) == manifest.num_shards


@pytest.mark.parametrize("store", ["auto", "ram"])
def test_threads_that_open_one_shard_fetch_it_once(server, settings, store):
    """Mutation: opening without the lock of the shard makes several of one, and asks the server for each in memory."""
    server.faults.chunk_pause_s = 0.05
    _, opened = open_at(server.url, settings(server.url, store=store))
    with ThreadPoolExecutor(8) as pool:
        shards = list(pool.map(opened.open, [0] * 8 + [1] * 8))
    assert len({id(shard) for shard in shards}) == 2
    assert sorted(names(server)) == ["shard-000000.tar", "shard-000001.tar"]


@pytest.mark.parametrize("store", ["auto", "ram"])
def test_a_hint_is_fetched_ahead_in_its_order(server, settings, store):
    """Mutation: fetching all of the hint, not its first shards, asks for the fourth."""
    _, opened = open_at(server.url, settings(server.url, shards_ahead=3, store=store))
    opened.prefetch([3, 1, 3, 0, 2])
    wait_for(lambda: len(names(server)) == 3)
    for shard in (3, 1, 0):
        opened.open(shard)
    assert names(server) == ["shard-000003.tar", "shard-000001.tar", "shard-000000.tar"]
    opened.prefetch([3, 1, 0, 2])
    wait_for(lambda: len(names(server)) == 4)
    opened.close()


def test_nothing_is_fetched_ahead_when_asked_not_to(server, settings):
    _, opened = open_at(server.url, settings(server.url, shards_ahead=0))
    before = threading.active_count()
    opened.prefetch([0, 1])
    assert threading.active_count() == before
    assert names(server) == []


@pytest.mark.parametrize("store", ["auto", "ram"])
def test_an_error_ahead_of_use_waits_for_the_use(folder, server, settings, store):
    """Mutation: leaving the thread at its first error never fetches shard 1."""
    _, opened = open_at(server.url, settings(server.url, store=store))
    server.faults.statuses = [403]
    opened.prefetch([0, 1])
    wait_for(lambda: len(names(server)) == 2)
    opened.open(1)
    server.faults.statuses = [403]
    with pytest.raises(DataError, match=r"shard-000000\.tar: the server answered 403"):
        opened.open(0)
    local = MapStore(load_manifest(str(folder), "train")).open(0)
    assert opened.open(0).read(0, 5).tolist() == local.read(0, 5).tolist()
    opened.close()


def test_close_ends_a_fetch_in_its_pause(server):
    """Mutation: sleeping in place of waiting for the event keeps the thread for a minute."""
    manifest = load_manifest(server.url, "train")
    opened = RamStore(manifest, Access(attempts=2, pause_s=60), 1 << 30, shards_ahead=1)
    server.faults.statuses = [503]
    opened.prefetch([0])
    wait_for(lambda: names(server))
    assert "megascale-fetch" in [thread.name for thread in threading.enumerate()]
    opened.close()
    opened.prefetch([1])
    assert "megascale-fetch" not in [thread.name for thread in threading.enumerate()]


def test_a_cached_file_of_another_size_is_fetched_again(server, settings, tmp_path):
    truth = tokens_of(*open_at(server.url, settings(server.url)))
    for path in (tmp_path / "cache").glob("*.tar"):
        path.write_bytes(path.read_bytes()[:-512])
    assert tokens_of(*open_at(server.url, settings(server.url))) == truth
    assert len(names(server)) == 2 * len(truth)


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 4
    path.unlink()
    path.write_bytes(content)


def test_a_damaged_block_table_in_the_cache_is_fetched_again(server, settings, tmp_path):
    manifest, store = open_at(server.url, settings(server.url))
    truth, info = tokens_of(manifest, store), manifest.shard(2)
    flip(tmp_path / "cache" / f"{info.sha256}.tar", info.index_offset + 200)
    assert tokens_of(*open_at(server.url, settings(server.url))) == truth
    assert names(server)[-1] == "shard-000002.tar"


def test_a_damaged_block_in_the_cache_is_found_and_can_be_renewed_once(server, settings, tmp_path):
    manifest, store = open_at(server.url, settings(server.url))
    truth, path = tokens_of(manifest, store), tmp_path / "cache" / f"{manifest.shard(2).sha256}.tar"
    flip(path, store.open(2).table[1].token_offset + 20)
    _, again = open_at(server.url, settings(server.url))
    with pytest.raises(DataError, match=rf"shard-000002.tar \(cached as {path}\): block 1: crc32 of the tokens"):
        tokens_of(manifest, again)
    assert again.renew(2)
    assert tokens_of(manifest, again) == truth
    assert not again.renew(2)


@pytest.mark.parametrize("store", ["auto", "ram"])
def test_a_budget_smaller_than_a_shard(server, settings, store):
    data = settings(server.url, max_gib=1e-6, store=store)
    with pytest.raises(ConfigError, match=r"max_gib = 1e-06 is 1073 bytes, and the largest shard has \d+; use 1\.91e"):
        open_at(server.url, data)
    open_at(server.url, settings(server.url, max_gib=1.91e-5, store=store))


def test_memory_keeps_to_its_budget(folder):
    """Mutation: counting shards in place of bytes keeps all four."""
    manifest = load_manifest(str(folder), "train")
    sizes = manifest.table["bytes"].tolist()
    store = RamStore(manifest, Access(attempts=1), sizes[0] + sizes[1], shards_ahead=4)
    chance, held = random.Random(0), []
    for shard in chance.choices(range(4), k=100):
        store.open(shard)
        held.append(sum(sizes[n] for n in range(4) if n in store._shards))
    assert max(held) <= sizes[0] + sizes[1]
    first = store.open(0)
    store.prefetch([1, 2, 3])
    wait_for(lambda: 1 in store._shards)
    store.close()
    assert first.read(0, 5).tolist() == MapStore(manifest).open(0).read(0, 5).tolist()


def test_open_shards_are_bounded_and_the_latest_stay():
    opened = OpenShards(lambda shard, stop: shard, lambda shard: 1, 3)
    for shard in (0, 1, 2, 0, 3):
        assert opened.get(shard) == shard
    assert [shard for shard in range(5) if shard in opened] == [0, 2, 3]
    opened.drop(0)
    assert opened.get(4) == 4
    assert [shard for shard in range(5) if shard in opened] == [2, 3, 4]
    assert opened.has_room(5, [2, 3])
    assert not opened.has_room(5, [2, 3, 4])


def test_a_new_hint_replaces_the_old_one():
    """Mutation: appending hints to one another fetches 1 and 2 as well."""
    fetched, first, go_on = [], threading.Event(), threading.Event()

    def fetch(shard, before, stop):
        fetched.append((shard, list(before)))
        first.set()
        assert go_on.wait(10)

    thread = FetchThread(fetch, 3)
    thread.want([0, 1, 2])
    assert first.wait(10)
    thread.want([5, 6])
    go_on.set()
    wait_for(lambda: len(fetched) == 3)
    thread.close()
    assert fetched == [(0, []), (5, []), (6, [5])]
