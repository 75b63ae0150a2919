"""Tokens per second of processor time that the loader gives: `python -m bench.loader`.

Sides, each giving int64 inputs and labels:

- `slices` cuts the same rows out of one raw file mapped into memory, their places known beforehand: no order to
  compute, no documents, no checksum, no short row.
- `rows` reads the rows of those places from shards, with the documents of each position.
- `loader` is the loader of a run: order, rows, ledger, digest, and the thread that makes steps ahead.
- `webdataset` is stock webdataset with a document a member. With `--peers FOLDER`, Megatron's GPTDataset and MosaicML's
  StreamingDataset too, from environments made in that folder.

All threads count. Sides alternate in one run; figures are medians, and ratios of a round are paired.
"""

import argparse
import ctypes
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import numpy as np
import torch

from bench.figures import describe_machine, show_head, show_ratios, show_row
from bench.peer_process import OTHERS, STOCK, run_peers
from data_tools.write_shards import write_index, write_shards
from megascale.config.batch_plan import constant_batch
from megascale.config.data import ONLY_CORPUS, DataConfig
from megascale.data.batch import Batch
from megascale.data.loader import Loader, build_batch
from megascale.data.mixture import PERIOD, MixtureStage
from megascale.data.objectives import Causal
from megascale.data.order import CorpusShape, RowOrder
from megascale.data.rows import open_corpus
from megascale.data.stream import Stream

VOCAB_SIZE, SEED = 50_000, 1
STEP_TOKENS, MICRO_BATCH_TOKENS = 1 << 16, 1 << 15
SHARD_BLOCKS = 4
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Makes glibc keep what is freed: page faults of new memory would cost more than the work, on every side."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def write_corpus(folder: Path, num_tokens: int, block_tokens: int, margin_tokens: int) -> np.ndarray:
    """Writes random documents as shards, and their tokens and a margin of zeros as one raw file, which comes mapped."""
    tokens = np.random.default_rng(SEED).integers(1, VOCAB_SIZE, num_tokens, dtype=np.uint16)
    np.append(tokens, np.zeros(margin_tokens, tokens.dtype)).tofile(folder / "raw.bin")
    lengths = list(draw_lengths(num_tokens))
    np.save(folder / "lengths.npy", lengths)
    documents = np.split(tokens, np.cumsum(lengths)[:-1])
    write_index(
        folder / "train",
        write_shards(folder / "train", documents, tokens.dtype, SHARD_BLOCKS * block_tokens, block_tokens),
        split="train", dtype="uint16", vocab_size=VOCAB_SIZE, eos_id=0, text_bytes=num_tokens,
        tokenizer_file="tokenizer.json", tokenizer_sha256="0" * 64,
    )
    # A plain array over the map: np.memmap's own slices take longer.
    return np.asarray(np.memmap(folder / "raw.bin", tokens.dtype, mode="r"))


def draw_lengths(num_tokens: int) -> Iterator[int]:
    """Lengths of documents like web pages, median 400 and mean 740, that add up to `num_tokens`."""
    random = np.random.default_rng(SEED)
    while num_tokens:
        length = min(max(1, int(random.lognormal(6.0, 1.1))), num_tokens)
        yield length
        num_tokens -= length


def open_loader(folder: Path, seq_len: int) -> Loader:
    """The loader of a run on one replica; it has opened no shard yet."""
    data = DataConfig(folder=str(folder))
    corpus = open_corpus(ONLY_CORPUS, data.sources[ONLY_CORPUS], "train", data, seq_len, VOCAB_SIZE)
    order = RowOrder([CorpusShape(ONLY_CORPUS, corpus.rows_per_shard)], [MixtureStage(0, (PERIOD,))], SEED)
    stream = Stream((corpus,), order, Causal(seq_len, 0, label_document_starts=True), SEED)
    return Loader(stream, constant_batch(STEP_TOKENS // seq_len), MICRO_BATCH_TOKENS // seq_len, 0, 1)


class Sides:
    """What is measured, on one corpus at one sequence length.

    Args:
        folder: of the corpus.
        memory: its raw tokens.
        seq_len: positions of a row.
    """

    def __init__(self, folder: Path, memory: np.ndarray, seq_len: int):
        self.loader, self.memory, self.seq_len = open_loader(folder, seq_len), memory, seq_len
        (self.corpus,) = self.loader.stream.corpora
        self.num_steps = self.corpus.num_rows // self.loader.batches.rows_of(0)
        self.num_tokens = self.num_steps * STEP_TOKENS
        self.numbers = np.concatenate([self.loader.row_numbers(step) for step in range(self.num_steps)])
        places = self.loader.stream.order.locate(self.numbers)
        shard_starts = np.cumsum([0, *self.corpus.manifest.table["tokens"].tolist()])
        self.places = list(zip(places.shards.tolist(), places.rows.tolist(), strict=True))
        self.starts = (shard_starts[places.shards] + places.rows * seq_len).tolist()

    def batches(self) -> Iterator[slice]:
        """Which rows are in each micro-batch."""
        for first in range(0, len(self.starts), self.loader.micro_rows):
            yield slice(first, first + self.loader.micro_rows)

    def read_slices(self) -> Iterator[Batch]:
        """The batches by slices of the raw file; all documents are one."""
        for part in self.batches():
            tokens_BT, labels_BT = np.empty((2, self.loader.micro_rows, self.seq_len), np.int64)
            for number, start in enumerate(self.starts[part]):
                row = self.memory[start : start + self.seq_len + 1]
                tokens_BT[number], labels_BT[number] = row[:-1], row[1:]
            tensors = [torch.from_numpy(array) for array in (tokens_BT, labels_BT)]
            yield Batch(*tensors, tensors[0], torch.from_numpy(self.numbers[part]))

    def read_rows(self) -> Iterator[Batch]:
        """The batches by rows of known places."""
        objective, keys = self.loader.stream.objective, np.zeros(self.loader.micro_rows, np.uint64)
        for part in self.batches():
            rows = [self.corpus.read(shard, row) for shard, row in self.places[part]]
            yield build_batch(objective.assemble(rows, keys), self.numbers[part], slice(None))

    def read_loader(self) -> Iterator[Batch]:
        """The batches of the first pass by the loader; its shards are open, their blocks checked."""
        steps = self.loader.steps_from(0)
        for _ in range(self.num_steps):
            yield from next(steps).micro_batches
        steps.close()

    def check_equal(self) -> None:
        """Makes sure that all give the same labels, padding aside. Opens every shard and checks every block."""
        for slices, *ours in zip(self.read_slices(), self.read_rows(), self.read_loader(), strict=True):
            for batch in ours:
                labels_BT = torch.where(batch.labels_BT < 0, slices.labels_BT, batch.labels_BT)
                assert torch.equal(labels_BT, slices.labels_BT)

    def pace(self, read: Callable[[], Iterator[Batch]]) -> float:
        """Tokens per second of processor time of all threads of this process."""
        started_s = time.process_time()
        for _ in read():
            pass
        return self.num_tokens / (time.process_time() - started_s)


def measure(folder: Path, memory: np.ndarray, seq_len: int, num_passes: int, envs: Path | None) -> Iterator[str]:
    """The rows of the table for one sequence length."""
    sides = Sides(folder, memory, seq_len)
    sides.check_equal()
    own = {"slices": sides.read_slices, "rows": sides.read_rows, "loader": sides.read_loader}
    with ExitStack() as stack:
        peers = stack.enter_context(run_peers((STOCK, *(OTHERS if envs else ())), envs, folder, seq_len))
        rounds = []
        for _ in range(num_passes):
            paces = {name: sides.pace(read) for name, read in own.items()}
            for name, peer in peers.items():
                tokens, seconds = peer.read_pass()
                paces[name] = tokens / seconds
            rounds.append(paces)
    for name in (*own, *peers):
        of_slices = show_ratios(paces[name] / paces["slices"] for paces in rounds)
        loader_over = show_ratios(paces["loader"] / paces[name] for paces in rounds)
        speed = median(paces[name] for paces in rounds) / 1e6
        yield show_row((seq_len, name, f"{speed:.1f} M", of_slices, loader_over, num_passes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seq-lens", nargs="+", type=int, default=[256, 1024, 4096])
    parser.add_argument("--tokens", type=int, default=1 << 24, help="tokens of the corpus")
    parser.add_argument("--block-tokens", type=int, default=1 << 20, help="tokens of a block")
    parser.add_argument("--passes", type=int, default=10)
    parser.add_argument("--peers", type=Path, help="folder of the peers' environments, which are made there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    print(describe_machine(["torch", "numpy", "webdataset"]))
    print(f"{options.tokens:,} tokens in blocks of {options.block_tokens:,}; batches of {MICRO_BATCH_TOKENS:,} tokens;")
    print("tokens per second of processor time; ratios of speeds: median (first to third quartile)\n")
    if options.peers is None:
        print("without Megatron and MosaicML streaming: --peers FOLDER makes their environments there\n")
    print(show_head(("seq_len", "side", "tokens/s", "side / slices", "loader / side", "passes")), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        memory = write_corpus(Path(folder), options.tokens, options.block_tokens, max(options.seq_lens))
        for seq_len in options.seq_lens:
            for row in measure(Path(folder), memory, seq_len, options.passes, options.peers):
                print(row, flush=True)


if __name__ == "__main__":
    main()
