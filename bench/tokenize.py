"""Tokens per second of processor time that tokenizing gives: `python -m bench.tokenize`.

The library `tokenizers` and tiktoken built from the same merges take the same texts in turns, on one core each; the
figures are medians over rounds. `tokenize` is all that a worker does to a chunk: reading, both hashes, tiktoken with
one document in 128 compared, and the write. Ids are compared first: they are equal or there is no table. The second
table is about size: bytes of shards of the default sizes against those of their tokens.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from bench.figures import describe_machine, show_head, show_ratios, show_row
from data_tools.corpora import PYTHON_STDLIB, cut_source, find_source
from data_tools.fast_bpe import FastBpe
from data_tools.readers import ReadCounts, read_documents
from data_tools.settings import BuildSettings
from data_tools.tokenize import TokenizeJob, encode_slow, tokenize_chunk
from data_tools.tokenizer import train_tokenizer
from data_tools.write_shards import write_shards
from megascale.data.tokenizer import parse_tokenizer

SPEED_COLUMNS = (
    "vocabulary", "tokens", "tokenizers, tokens/s", "tiktoken, tokens/s", "tokenize, tokens/s",
    "tiktoken / tokenizers", "tokenize / tokenizers", "rounds",
)  # fmt: skip
SIZE_COLUMNS = ("tokens", "shards", "bytes", "bytes / 2 per token")


def processor_seconds(work: Callable[[], object]) -> float:
    """Processor time of this process."""
    started_s = time.process_time()
    work()
    return time.process_time() - started_s


def measure_speed(texts: list[str], vocab_size: int, rounds: int, folder: Path) -> str:
    """One row of the first table."""
    content = train_tokenizer(texts, vocab_size).to_str().encode()
    tokenizer, fast = parse_tokenizer(content, "bench"), FastBpe(content)
    ids = encode_slow(tokenizer, texts)
    assert all(np.array_equal(fast.encode(text), part) for text, part in zip(texts, ids, strict=True))
    (folder / "tokenizer.json").write_bytes(content)
    (folder / "source").mkdir()
    for number, text in enumerate(texts):
        (folder / "source" / f"{number:05d}.txt").write_text(text, encoding="utf-8")
    source = find_source(str(folder / "source"))
    (pieces,) = cut_source(source, 1 << 40)
    job = TokenizeJob(source, folder, folder / "tokenizer.json", "bench", 0, np.dtype("<u2"), use_fast=True)
    works = {
        "tokenizers": lambda: encode_slow(tokenizer, texts),
        "tiktoken": lambda: [fast.encode(text) for text in texts],
        "tokenize": lambda: tokenize_chunk(job, 0, pieces),
    }
    works["tokenize"]()
    seconds = [{name: processor_seconds(work) for name, work in works.items()} for _ in range(rounds)]
    num_tokens = sum(map(len, ids))
    speeds = [f"{num_tokens / median(pair[name] for pair in seconds) / 1e6:.2f} M" for name in works]
    ratios = [show_ratios(pair["tokenizers"] / pair[name] for pair in seconds) for name in ("tiktoken", "tokenize")]
    return show_row((vocab_size, f"{num_tokens:,}", *speeds, *ratios, rounds))


def measure_size(num_tokens: int, folder: Path) -> str:
    """One row of the second table: documents of 100 to 2,000 random tokens."""
    random, settings = np.random.default_rng(1), BuildSettings()
    lengths = random.integers(100, 2000, num_tokens // 1050)
    tokens = random.integers(1, 50_000, int(lengths.sum()), dtype=np.uint16)
    documents = np.split(tokens, np.cumsum(lengths)[:-1])
    shards = write_shards(folder, documents, np.dtype("<u2"), settings.shard_tokens, settings.block_tokens)
    size = sum(shard.bytes for shard in shards)
    return show_row((f"{len(tokens):,}", len(shards), f"{size:,}", f"{size / tokens.nbytes:.5f}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab-sizes", nargs="+", type=int, default=[8192, 32768])
    parser.add_argument("--text-bytes", type=int, default=12_000_000, help="text of the standard library taken")
    parser.add_argument("--tokens", type=int, default=1 << 27, help="tokens of the corpus of which the size is taken")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # read when a batch is first encoded
    texts, size = [], 0
    for document in read_documents(find_source(PYTHON_STDLIB), ReadCounts()):
        texts.append(document.text)
        size += len(document.text)
        if size >= arguments.text_bytes:
            break
    print(f"{describe_machine(['tokenizers', 'tiktoken', 'webdataset', 'numpy'])}\n")
    print(show_head(SPEED_COLUMNS))
    for vocab_size in arguments.vocab_sizes:
        with tempfile.TemporaryDirectory() as folder:
            print(measure_speed(texts, vocab_size, arguments.rounds, Path(folder)), flush=True)
    print(f"\n{show_head(SIZE_COLUMNS)}")
    with tempfile.TemporaryDirectory() as folder:
        print(measure_size(arguments.tokens, Path(folder) / "train"))


if __name__ == "__main__":
    main()
