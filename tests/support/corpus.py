"""Tiny corpora for tests: one of synthetic tokens, made in milliseconds, and one through the real tools."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers

from data_tools.build import build_corpus
from data_tools.corpora import find_source
from data_tools.settings import EOS_TOKEN, BuildSettings
from data_tools.write_shards import write_index, write_shards

QUIET = Console(quiet=True)
WORDS = ["def", "return", "class", "self", "import", "value", "number", "for", "in", "if", "else", "None", "print"]


def make_corpus(
    folder: Path,
    num_documents: int = 64,
    vocab_size: int = 97,
    seed: int = 0,
    num_validation_documents: int = 16,
    shard_tokens: int = 2048,
    block_tokens: int = 512,
) -> Path:
    """Makes a corpus of synthetic tokens that a model can learn: most tokens follow from the one before.

    Documents have 20 to 200 tokens, so the defaults give about 7,000 training tokens in 4 shards. The tokenizer
    writes token n as the word `wn`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel({EOS_TOKEN: 0, **{f"w{n}": n for n in range(1, vocab_size)}}, EOS_TOKEN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    for number, (split, count) in enumerate({"train": num_documents, "validation": num_validation_documents}.items()):
        if count:
            documents = list(synthetic_documents(count, vocab_size, 2 * seed + number))
            write_index(
                folder / split,
                write_shards(folder / split, documents, dtype, shard_tokens, block_tokens),
                split=split,
                dtype=dtype.name,
                vocab_size=vocab_size,
                eos_id=0,
                text_bytes=sum(len(f"w{token} ") for document in documents for token in document[:-1]),
                tokenizer_file="tokenizer.json",
                tokenizer_sha256=hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
            )
    return folder


def synthetic_documents(count: int, vocab_size: int, seed: int) -> Iterator[np.ndarray]:
    """Documents in which token t is followed by 3 t + 1, or with probability 0.1 by any token; token 0 ends them."""
    random = np.random.default_rng(seed)
    for length in random.integers(20, 201, count).tolist():
        jumps = random.random(length) < 0.1
        tokens = random.integers(1, vocab_size, length)
        for place in range(1, length):
            if not jumps[place]:
                tokens[place] = (3 * tokens[place - 1] + 1) % (vocab_size - 1) + 1
        yield np.append(tokens[:-1], 0).astype(np.uint32)


def make_text(folder: Path, num_documents: int = 40, seed: int = 0) -> Path:
    """Writes a folder of small text files."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_documents):
        lines = [" ".join(random.choice(WORDS, 8)) for _ in range(int(random.integers(3, 30)))]
        (folder / f"{number:03d}.txt").write_text("\n".join(lines) + "\n")
    return folder


def make_text_corpus(folder: Path, num_documents: int = 40, vocab_size: int = 300, seed: int = 0) -> Path:
    """Makes a corpus by the real tools: text files, a trained tokenizer, shards and index."""
    source = make_text(folder.parent / f"{folder.name}-text", num_documents, seed)
    settings = BuildSettings(vocab_size=vocab_size, validation_fraction=0.2, shard_tokens=4096, block_tokens=1024)
    build_corpus(find_source(str(source)), folder, settings, 1, QUIET)
    return folder
