"""What every peer's script shares: the corpus as the bench wrote it, and one pass for each line on standard input."""

import ctypes
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """As the bench does for its own sides."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


class Corpus:
    """Tokens and lengths of documents, in a folder where the peer may also write its own format."""

    batch_rows, vocab_size = 8, 50_000

    def __init__(self, folder: Path, seq_len: int):
        self.folder, self.seq_len = folder, seq_len
        self.lengths = np.load(folder / "lengths.npy")
        self.num_tokens = int(self.lengths.sum())
        keep_freed_memory()

    def documents(self) -> Iterator[np.ndarray]:
        """The documents, in order."""
        tokens, start = np.fromfile(self.folder / "raw.bin", np.uint16), 0  # beyond the last document lies a margin
        for length in self.lengths.tolist():
            yield tokens[start : start + length]
            start += length


def answer_passes(read_pass: Callable[[], int]) -> None:
    """Prints `ready`, then for each line that comes tokens and processor seconds of a pass, all threads counted."""
    read_pass()
    out, sys.stdout = sys.stdout, sys.stderr  # what a library prints isn't an answer
    print("ready", file=out, flush=True)
    for _ in sys.stdin:
        started_s = time.process_time()
        tokens = read_pass()
        print(json.dumps({"tokens": tokens, "seconds": time.process_time() - started_s}), file=out, flush=True)
