"""Tokens per second of processor time that the loader gives: `python -m bench.loader`.

The other side slices the same rows out of one raw file mapped into memory, into equal int64 batches, their places known
beforehand: no order to compute, no checksum, no short row. The loader's thread counts, and so do the steps that it made
ahead and nobody took. Passes alternate; the figures are medians of paired ratios.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import torch

from bench.figures import describe_machine, show_head, show_ratios, show_row
from data_tools.write_shards import write_shards
from megascale.data.batch import Batch
from megascale.data.loader import Loader
from megascale.data.manifest import FORMAT_VERSION, Manifest
from megascale.data.order import RowOrder
from megascale.data.rows import CorpusRows

COLUMNS = (
    "seq_len", "slices, tokens/s", "first pass, tokens/s", "later pass, tokens/s", "first / slices", "later / slices",
    "passes",
)
VOCAB_SIZE, SEED = 50_000, 1
STEP_TOKENS, MICRO_BATCH_TOKENS = 1 << 16, 1 << 14
DOCUMENT_TOKENS = (100, 2000)
SHARD_BLOCKS = 4


def write_corpus(folder: Path, num_tokens: int, block_tokens: int, margin_tokens: int) -> tuple[Manifest, np.ndarray]:
    """Writes random documents as shards, and their tokens and a margin of zeros as one raw file, which comes mapped."""
    tokens = np.random.default_rng(SEED).integers(1, VOCAB_SIZE, num_tokens, dtype=np.uint16)
    np.append(tokens, np.zeros(margin_tokens, tokens.dtype)).tofile(folder / "raw.bin")
    manifest = Manifest(
        folder=folder, format_version=FORMAT_VERSION, split="train", dtype="uint16", vocab_size=VOCAB_SIZE, eos_id=0,
        text_bytes=num_tokens, tokenizer_file="tokenizer.json", tokenizer_sha256="0" * 64,
        shards=write_shards(folder / "train", cut(tokens), tokens.dtype, SHARD_BLOCKS * block_tokens, block_tokens),
    )
    # A plain array over the map: np.memmap's own slices take longer.
    return manifest, np.asarray(np.memmap(folder / "raw.bin", tokens.dtype, mode="r"))


def cut(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """Cuts tokens into documents of random length."""
    random, start = np.random.default_rng(SEED), 0
    while start < len(tokens):
        stop = start + int(random.integers(*DOCUMENT_TOKENS))
        yield tokens[start:stop]
        start = stop


def open_loader(manifest: Manifest, seq_len: int) -> Loader:
    """The loader of a run on one replica; it has opened no shard yet."""
    rows = CorpusRows(manifest, seq_len)
    return Loader(
        rows, RowOrder(rows.rows_per_shard, SEED), STEP_TOKENS // seq_len, MICRO_BATCH_TOKENS // seq_len, 0, 1
    )


def steps_per_pass(loader: Loader) -> int:
    """Whole steps in the corpus."""
    return loader.rows.num_rows // loader.global_rows


def read_pass(loader: Loader, number: int) -> None:
    """Takes every step of a pass."""
    num_steps = steps_per_pass(loader)
    steps = loader.steps_from(number * num_steps * loader.global_rows)
    for _ in range(num_steps):
        next(steps)
    steps.close()


def row_starts(loader: Loader) -> list[list[int]]:
    """Where in the raw file the rows of each micro-batch of the first pass begin."""
    shard_starts = np.cumsum([0, *(shard.tokens for shard in loader.rows.manifest.shards)])
    numbers = [
        loader.order.replica_rows(step * loader.global_rows, loader.global_rows, 0, 1)
        for step in range(steps_per_pass(loader))
    ]
    _, shards, rows = loader.order.locate(np.concatenate(numbers))
    return (shard_starts[shards] + rows * loader.rows.seq_len).reshape(-1, loader.micro_rows).tolist()


def slice_batch(memory: np.ndarray, starts: list[int], seq_len: int) -> Batch:
    """The batch of the rows that begin at these places."""
    tokens_BT, labels_BT = np.empty((2, len(starts), seq_len), np.int64)
    for number, start in enumerate(starts):
        row = memory[start : start + seq_len + 1]
        tokens_BT[number], labels_BT[number] = row[:-1], row[1:]
    return Batch(torch.from_numpy(tokens_BT), torch.from_numpy(labels_BT), torch.arange(len(starts)))


def check_equal(loader: Loader, memory: np.ndarray, starts: list[list[int]]) -> None:
    """Makes sure that both sides give the same labels, padding aside."""
    steps = loader.steps_from(0)
    for ours, places in zip(next(steps), starts, strict=False):
        labels_BT = slice_batch(memory, places, loader.rows.seq_len).labels_BT
        assert torch.equal(torch.where(ours.labels_BT < 0, labels_BT, ours.labels_BT), labels_BT)
    steps.close()


def processor_seconds(work: Callable[[], None]) -> float:
    """Processor time of all threads of this process."""
    started_s = time.process_time()
    work()
    return time.process_time() - started_s


def measure(manifest: Manifest, memory: np.ndarray, seq_len: int, num_passes: int) -> str:
    """One row of the table."""
    loader = open_loader(manifest, seq_len)
    starts = row_starts(loader)
    check_equal(loader, memory, starts)
    read_pass(loader, 0)

    def slices() -> None:
        for places in starts:
            slice_batch(memory, places, seq_len)

    works = {
        "slices": slices,
        "first": lambda: read_pass(open_loader(manifest, seq_len), 0),
        "later": lambda: read_pass(loader, 1),
    }
    seconds = [{name: processor_seconds(work) for name, work in works.items()} for _ in range(num_passes)]
    num_tokens = steps_per_pass(loader) * STEP_TOKENS
    speeds = [f"{num_tokens / median(pair[name] for pair in seconds) / 1e6:.0f} M" for name in works]
    ratios = [show_ratios(pair["slices"] / pair[name] for pair in seconds) for name in ("first", "later")]
    return show_row((seq_len, *speeds, *ratios, num_passes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seq-lens", nargs="+", type=int, default=[256, 1024, 4096])
    parser.add_argument("--tokens", type=int, default=1 << 24, help="tokens of the corpus")
    parser.add_argument("--block-tokens", type=int, default=1 << 20, help="tokens of a block")
    parser.add_argument("--passes", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(describe_machine(["torch", "numpy"]))
    print(f"{options.tokens:,} tokens in blocks of {options.block_tokens:,}; steps of {STEP_TOKENS:,} tokens; speeds")
    print("per second of processor time; ratios of speeds: median (first to third quartile)\n")
    print(show_head(COLUMNS), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        manifest, memory = write_corpus(Path(folder), options.tokens, options.block_tokens, max(options.seq_lens))
        for seq_len in options.seq_lens:
            print(measure(manifest, memory, seq_len, options.passes), flush=True)


if __name__ == "__main__":
    main()
