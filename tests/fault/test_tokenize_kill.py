"""A build that is killed, again and again, ends with the bytes of one that nobody touched.

Mutations seen to be caught: building in the output folder itself; `NUMBER.json` of a chunk written before its tokens;
split folders of a killed build left in place; workers that outlive the build.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_tools import build, splits, tokenize
from data_tools.corpora import find_source
from megascale.errors import DataError
from tests.support.corpus import QUIET, make_text
from tests.support.ranks import REPOSITORY
from tests.unit.test_tools_build import SETTINGS, files

SHARED_BUILD = """
import sys
from pathlib import Path
from data_tools import build, chunks
from tests.unit.test_tools_build import QUIET, SETTINGS, find_source

if __name__ == "__main__":
    chunks.MIN_CHUNK_BYTES = 3000
    build.build_corpus(find_source(sys.argv[1]), Path(sys.argv[2]), SETTINGS, 2, QUIET)
"""

KILLS = [
    (build, "write_file", 1), (build, "write_tokenizer_file", 1), (tokenize, "write_chunk", 1),
    (tokenize, "finish_chunk", 3), (tokenize, "tokenize_pieces", 5), (splits, "write_shards", 1),
    (splits, "write_index", 1), (splits, "write_index", 2), (build, "replace_folder", 1),
]  # fmt: skip
"""At the n-th call of a function, counted within one attempt."""


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """The source, and what a build that nobody interrupts makes of it."""
    folder = tmp_path_factory.mktemp("clean")
    make_text(folder / "text")
    run(folder, folder / "out")
    return folder


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr("data_tools.chunks.MIN_CHUNK_BYTES", 3000)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # no threads: forked below


def run(clean, out):
    return build.build_corpus(find_source(str(clean / "text")), out, SETTINGS, 1, QUIET)


def run_killed(clean, out, module, name, number):
    """An attempt in a process that kills itself. Returns the signal that it ended with."""
    pid = os.fork()
    if pid == 0:
        try:
            original, calls = getattr(module, name), iter(range(1, 1000))

            def killing(*arguments, **options):
                if next(calls) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **options)

            setattr(module, name, killing)
            run(clean, out)
        finally:
            os._exit(1)
    return os.WTERMSIG(os.waitpid(pid, 0)[1])


def test_killed_everywhere_in_turn(clean, tmp_path):
    out, partial, num_done = tmp_path / "out", tmp_path / ".out.partial", []
    for kill in KILLS:
        assert run_killed(clean, out, *kill) == signal.SIGKILL, kill
        assert not out.exists()
        num_done.append(len(list(partial.glob("chunks/*.json"))))
    assert num_done[:5] == [0, 0, 0, 2, 6], "two chunks, and four more before the fifth that was begun"
    assert run(clean, out).is_new
    assert files(out) == files(clean / "out")
    assert not partial.exists()


@pytest.fixture
def shared_build(clean, tmp_path):
    """A build with two workers that has begun."""
    program = tmp_path / "program.py"
    program.write_text(SHARED_BUILD)
    process = subprocess.Popen(
        [sys.executable, str(program), str(clean / "text"), str(tmp_path / "out")],
        cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until(lambda: find_workers(process))
    yield process
    process.kill()
    process.communicate()


def test_killed_with_workers_and_finished_without(clean, tmp_path, shared_build):
    """The workers die with the build that started them, and its lock is free."""
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"another build of .*out is running"):
        run(clean, out)
    workers = find_workers(shared_build)
    shared_build.kill()
    shared_build.wait(60)
    wait_until(lambda: not any(command_of(worker) for worker in workers))
    assert not out.exists()
    assert run(clean, out).is_new
    assert files(out) == files(clean / "out")


def test_killed_worker(clean, tmp_path, shared_build):
    """Out of memory, say: an error that says so, and the next build goes on."""
    os.kill(find_workers(shared_build)[0], signal.SIGKILL)
    assert "one of 2 tokenizing processes was killed, out of memory perhaps" in shared_build.communicate(timeout=60)[1]
    assert run(clean, tmp_path / "out").is_new
    assert files(tmp_path / "out") == files(clean / "out")


def find_workers(process):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii").split()
    return [int(pid) for pid in children if "spawn_main" in command_of(pid)]


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")
    except OSError:
        return ""


def wait_until(is_true, limit_s=60):
    deadline = time.monotonic() + limit_s
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)
