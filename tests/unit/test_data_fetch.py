"""Bytes from elsewhere: whole and right, or one error that names the url, what was tried and what was answered."""

import hashlib
import io
import os
import random
import sys
import threading
import tracemalloc
from dataclasses import replace

import pytest

from megascale.data.fetch import fetch_file, fetch_verified, read_bytes
from megascale.data.location import join
from megascale.data.transfer import Access, FetchStoppedError
from megascale.errors import ConfigError, DataError
from tests.support.http_server import serve
from tests.support.s3_server import serve_s3

CONTENT = random.Random(0).randbytes(300_000)
ACCESS = Access(attempts=3, timeout_s=5, pause_s=0.001)
COMMANDS = replace(ACCESS, allow_commands=True)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    return tmp_path


@pytest.fixture
def server(folder):
    with serve(folder) as server:
        yield server


def fetch(place, access=ACCESS, expected_bytes=300_000):
    file = io.BytesIO()
    fetch_file(place, file, expected_bytes, access)
    return file.getvalue()


def ranges(server):
    return [asked for _, asked in server.requests]


def test_a_lost_connection_is_taken_up_where_it_was_lost(server):
    """Mutation: keeping `file.tell()` out of the Range header gives other bytes after the first drop."""
    server.faults.drops = [100_000, 50_000]
    assert fetch(f"{server.url}/file") == CONTENT
    assert ranges(server) == [None, "bytes=100000-", "bytes=150000-"]
    server.faults.drops = [1000]
    assert read_bytes(f"{server.url}/file", ACCESS) == CONTENT


def test_a_server_without_ranges_sends_the_whole_file_again(server):
    """Mutation: starting every body at the byte asked for appends the file to its own beginning."""
    server.faults.ignores_range, server.faults.drops = True, [100_000]
    assert fetch(f"{server.url}/file") == CONTENT
    assert len(server.requests) == 2


@pytest.mark.parametrize("ignores_range", [False, True])
def test_random_drops_at_random_places(folder, ignores_range):
    """Mutation: not returning to the start after a whole body came in place of a part fails with ignores_range."""
    chance = random.Random(1)
    with serve(folder, drop_fraction=0.6, ignores_range=ignores_range) as server:
        for number in range(40):
            size = chance.choice([0, 1, 512, 65_536, 99_999])
            (folder / f"{number}").write_bytes(CONTENT[number : number + size])
            found = fetch(f"{server.url}/{number}", replace(ACCESS, attempts=60, pause_s=0.0), size)
            assert found == CONTENT[number : number + size]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_answers_that_ask_to_come_again(server, status):
    server.faults.statuses = [status, status]
    assert read_bytes(f"{server.url}/file", ACCESS) == CONTENT
    server.faults.statuses = [status] * 3
    with pytest.raises(DataError, match=rf"/file can't be fetched: the server answered {status} .*; tried 3 times"):
        fetch(f"{server.url}/file")


def test_a_missing_file_is_asked_for_once(server):
    with pytest.raises(FileNotFoundError, match=r"http://127.*/none"):
        read_bytes(f"{server.url}/none", ACCESS)
    with pytest.raises(DataError, match=r"/none doesn't exist, and the index lists it with 300000 bytes; upload it"):
        fetch(f"{server.url}/none")
    assert len(server.requests) == 2


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_is_final(server, status):
    server.faults.statuses = [status]
    with pytest.raises(DataError, match=rf"/file: the server answered {status} .*; is the url right, and may this"):
        read_bytes(f"{server.url}/file", ACCESS)
    assert len(server.requests) == 1


def test_nobody_listens(folder):
    with serve(folder) as server:
        url = server.url
    with pytest.raises(DataError, match=r"can't be fetched: no answer \(.*refused\); tried 3 times"):
        read_bytes(f"{url}/file", ACCESS)


def test_a_silent_server(server):
    server.faults.chunk_pause_s = 0.5
    with pytest.raises(DataError, match=r"can't be fetched: .*timed out.*; tried 2 times"):
        fetch(f"{server.url}/file", Access(attempts=2, timeout_s=0.05, pause_s=0.001))


def test_a_file_that_was_cut_short(server):
    with pytest.raises(DataError, match=r"/file can't be fetched: it has 300000 bytes, 400000 are expected"):
        fetch(f"{server.url}/file", expected_bytes=400_000)


def test_a_file_that_has_grown(server):
    """Never more than a byte beyond the expected size is read or kept."""
    file = io.BytesIO()
    with pytest.raises(DataError, match=r"it has more than 200000 bytes, the expected size: was it replaced\?"):
        fetch_file(f"{server.url}/file", file, 200_000, ACCESS)
    assert len(file.getvalue()) <= 200_000


@pytest.mark.parametrize(("extra", "message"), [(10, "ended after 300000 of 300010"), (-10, "it has 299990 bytes")])
def test_a_wrong_content_length(server, extra, message):
    server.faults.announced_extra, server.faults.ignores_range = extra, True
    with pytest.raises(DataError, match=message):
        fetch(f"{server.url}/file")


def test_flipped_bits_are_fetched_again(server):
    """Mutation: hashing what the table says in place of what came lets the flipped file through."""
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    server.faults.flip_fraction = 0.5
    for _ in range(10):
        file = io.BytesIO()
        fetch_verified(f"{server.url}/file", file, len(CONTENT), sha256, replace(ACCESS, attempts=30))
        assert file.getvalue() == CONTENT
    server.faults.flip_fraction = 1.0
    with pytest.raises(DataError, match=rf"/file: sha256 .*, expected {sha256[:12]}\.\.\., fetched 3 times"):
        fetch_verified(f"{server.url}/file", io.BytesIO(), len(CONTENT), sha256, ACCESS)


def test_memory_is_bounded(folder, server):
    size = 24 << 20
    (folder / "large").write_bytes(bytes(size))
    tracemalloc.start()
    with (folder / "copy").open("w+b") as file:
        fetch_file(f"{server.url}/large", file, size, ACCESS)
    # The server of the test, in this process, holds the file twice.
    assert tracemalloc.get_traced_memory()[1] < 2 * size + (8 << 20)
    tracemalloc.stop()
    assert (folder / "copy").stat().st_size == size


def test_a_fetch_that_is_stopped(server):
    stop = threading.Event()
    stop.set()
    with pytest.raises(FetchStoppedError):
        fetch_file(f"{server.url}/file", io.BytesIO(), len(CONTENT), ACCESS, stop)
    assert server.requests == []


def test_a_password_comes_from_netrc_and_goes_to_its_server_alone(folder, server, tmp_path, monkeypatch):
    """Mutation: an ordinary header in place of an unredirected one gives the password to the second server."""
    (tmp_path / "netrc").write_text("machine localhost login me password s3cret!\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with serve(folder) as other:
        server.faults.redirect_to = other.url
        url = server.url.replace("127.0.0.1", "localhost")
        assert read_bytes(f"{url}/file?token=hidden", ACCESS) == CONTENT
    assert server.headers[0]["Authorization"] == "Basic bWU6czNjcmV0IQ=="
    assert "Authorization" not in other.headers[0]
    assert server.requests[0][0] == "/file?token=hidden"


def test_a_password_in_a_url_is_refused(server):
    url = server.url.replace("://", "://me:s3cret@")
    with pytest.raises(ConfigError, match=r"://\*\*\*@127.0.0.1:\d+/file: a url in a config is stored .* ~/\.netrc"):
        read_bytes(f"{url}/file", ACCESS)
    assert server.requests == []


def test_secrets_stay_out_of_messages(server):
    for path, statuses in [("none", []), ("file", [403]), ("file", [500] * 3), ("file", [])]:
        server.faults.statuses = statuses
        with pytest.raises(DataError) as caught:
            fetch(f"{server.url}/{path}?token=hidden", expected_bytes=7)
        assert f"/{path}?***" in str(caught.value)
        assert "hidden" not in str(caught.value)


def test_redirects_stay_with_http(server):
    server.faults.redirect_to = "ftp://127.0.0.1"
    with pytest.raises(DataError, match=r"/file can't be fetched: no answer \(unknown url type: ftp\)"):
        read_bytes(f"{server.url}/file", ACCESS)


def test_names_go_before_a_query():
    assert join("https://host/corpus/?sig=a/b", "train", "index.json") == "https://host/corpus/train/index.json?sig=a/b"

def test_no_message_holds_the_secrets_of_urls():
    message = "https://u:p@host/a?sig=1 and s3://b/c"
    assert str(DataError(message)) == "https://***@host/a?*** and s3://b/c"


@pytest.mark.parametrize("place", ["ftp://host/file", "hdfs://host/file", "ais://host/file"])
def test_schemes_that_nothing_reads(place):
    with pytest.raises(ConfigError, match=r"nothing reads .*; use a local path, http://, https://, s3://, gs://, az://"):
        read_bytes(place, COMMANDS)


@pytest.mark.parametrize("place", ["http://", "http://host:port/file", "http://host/a file", "http://h/\nX-Header: 1"])
def test_urls_that_are_none(place):
    with pytest.raises(ConfigError, match="is no url; write it as: https://HOST/FOLDER"):
        read_bytes(place, ACCESS)


def test_an_object_store_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(DataError, match=r"gs:// is read by the package gcsfs .*; install it with: pip install gcsfs"):
        read_bytes("gs://bucket/file", ACCESS)


def test_an_object_store(folder):
    with serve_s3(folder) as bucket:
        assert read_bytes(f"{bucket}/file", ACCESS) == CONTENT
        assert fetch(f"{bucket}/file") == CONTENT
        with pytest.raises(DataError, match=r"s3://corpora/file can't be fetched: it has 300000 bytes, 400000 are"):
            fetch(f"{bucket}/file", expected_bytes=400_000)
        with pytest.raises(FileNotFoundError):
            read_bytes(f"{bucket}/none", ACCESS)
        with pytest.raises(DataError, match=r"s3://nobody/file doesn't exist"):
            fetch("s3://nobody/file")


def test_commands_are_refused_unless_allowed(folder):
    marker = folder / "marker"
    with pytest.raises(ConfigError, match=r"runs a command on this machine.*set data\.allow_commands: true"):
        read_bytes(f"pipe:touch {marker}", ACCESS)
    assert not marker.exists()
    assert read_bytes(f"pipe:cat {folder}/file", COMMANDS) == CONTENT


def test_a_command_that_ends_early_with_status_0(folder):
    with pytest.raises(DataError, match=r"pipe:head .* can't be fetched: it has 1000 bytes, 300000 are expected"):
        fetch(f"pipe:head -c 1000 {folder}/file", COMMANDS)


@pytest.mark.parametrize("status", [3, 141])
def test_a_command_that_fails(folder, status):
    """Also with the status that webdataset takes for a success. Mutation: not looking at it lets 141 through."""
    with pytest.raises(DataError, match=rf"the command failed, exit status {status}; it wrote: no such host.*3 times"):
        read_bytes(f"pipe:cat {folder}/file; echo no such host >&2; exit {status}", COMMANDS)


def test_a_command_that_hangs_is_ended_with_its_children(folder):
    place = f"pipe:sleep 1000 & echo $! > {folder}/pid; wait"
    with pytest.raises(DataError, match=r"the command has written nothing for 0\.3 s; tried 1 times"):
        read_bytes(place, replace(COMMANDS, timeout_s=0.3, attempts=1))
    with pytest.raises(ProcessLookupError):
        _wait_until_gone(int((folder / "pid").read_text()))


def _wait_until_gone(pid):
    """Signals a process until it is reaped; an orphan's new parent takes a moment."""
    for _ in range(500):
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            if file.read().rpartition(")")[2].split()[0] == "Z":
                raise ProcessLookupError
        threading.Event().wait(0.01)


def test_the_environment_does_not_redirect(folder, server, monkeypatch):
    """webdataset would follow it to other bytes. Mutation: opening with `webdataset.gopen.gopen` does."""
    (folder / "other").write_bytes(b"other")
    monkeypatch.setenv("GOPEN_REWRITE", f"{server.url}/file={server.url}/other;pipe:cat {folder}/file=pipe:cat other")
    assert read_bytes(f"{server.url}/file", ACCESS) == CONTENT
    assert read_bytes(f"pipe:cat {folder}/file", COMMANDS) == CONTENT
