"""Other systems' loaders as processes that read a pass when told to, each with an interpreter that has its package."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple


class Peer(NamedTuple):
    """A peer.

    Attributes:
        name: as the table calls it.
        script: in `bench/peers`.
        packages: what its environment needs beside this one's; none: it has no environment of its own.
    """

    name: str
    script: str
    packages: tuple[str, ...]


STOCK = Peer("webdataset", "stock_webdataset.py", ())
OTHERS = (
    Peer("Megatron", "megatron_gpt.py", ("megatron-core==0.16.1",)),
    Peer(
        "streaming", "mosaic_streaming.py",
        ("mosaicml-streaming==0.13.0", "brotli", "zstd", "python-snappy", "cramjam", "xxhash<4", "catalogue"),
    ),
)


class PeerProcess:
    """A running peer."""

    def __init__(self, process: subprocess.Popen):
        self._process = process

    def read_pass(self) -> tuple[int, float]:
        """(tokens, processor seconds) of one pass."""
        self._process.stdin.write("pass\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return answer["tokens"], answer["seconds"]


@contextmanager
def run_peers(peers: Sequence[Peer], envs: Path | None, data: Path, seq_len: int) -> Iterator[dict[str, PeerProcess]]:
    """The peers at work on a corpus; they have read it once.

    Args:
        envs: where the environments of peers are, or are made.
        data: folder with `raw.bin` and `lengths.npy`.
    """
    with ExitStack() as stack:
        yield {peer.name: stack.enter_context(_run(peer, envs, data, seq_len)) for peer in peers}


@contextmanager
def _run(peer: Peer, envs: Path | None, data: Path, seq_len: int) -> Iterator[PeerProcess]:
    folder = data / f"{Path(peer.script).stem}-{seq_len}"
    folder.mkdir()
    for name in ("raw.bin", "lengths.npy"):
        (folder / name).hardlink_to(data / name)
    python = make_environment(envs / peer.name, peer.packages) if peer.packages else Path(sys.executable)
    script = Path(__file__).parent / "peers" / peer.script
    process = subprocess.Popen(
        [python, "-W", "ignore", script, folder, str(seq_len)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{peer.name} didn't start: {process.stderr.read()[-3000:]}")
        yield PeerProcess(process)
    finally:
        process.kill()
        process.wait()


def make_environment(folder: Path, packages: Sequence[str]) -> Path:
    """The interpreter of an environment with these packages, and this environment's for what else they import.

    Nothing that they ask for is installed beside them: it would bring another torch.
    """
    python, done = folder / "bin" / "python", folder / "complete"
    if not done.exists():
        venv.create(folder, with_pip=True, clear=True)
        own = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True,
            check=True,
        ).stdout.strip()
        Path(own, "this_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *packages], check=True)
        done.touch()
    return python
