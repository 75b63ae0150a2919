"""Reads batches through Megatron's GPTDataset: run by an interpreter that has megatron-core."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split
from peer_loop import Corpus, answer_passes


def open_dataset(corpus: Corpus) -> GPTDataset:
    """Writes the documents in Megatron's format and opens them in its shuffled order."""
    prefix = str(corpus.folder / "megatron")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in corpus.documents():
        builder.add_document(torch.from_numpy(document.astype(np.int64)), [len(document)])
    builder.finalize(f"{prefix}.idx")
    tokenizer = SimpleNamespace(eod=0, pad=0, vocab_size=corpus.vocab_size, unique_identifiers={"name": "bench"})
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=corpus.seq_len, blend=([prefix], None), split="1,0,0", tokenizer=tokenizer,
        path_to_cache=str(corpus.folder / "megatron-cache"), reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, create_attention_mask=False,
    )
    num_samples = (corpus.num_tokens - 1) // corpus.seq_len
    indexed = IndexedDataset(prefix)
    return GPTDataset(indexed, prefix, np.arange(len(corpus.lengths), dtype=np.int32), num_samples, Split.train, config)


def main() -> None:
    corpus = Corpus(Path(sys.argv[1]), int(sys.argv[2]))
    dataset = open_dataset(corpus)

    def read_pass() -> int:
        num_batches = len(dataset) // corpus.batch_rows
        for number in range(num_batches):
            rows = [dataset[number * corpus.batch_rows + row] for row in range(corpus.batch_rows)]
            for name in ("tokens", "labels"):
                torch.stack([row[name] for row in rows])
        return num_batches * corpus.batch_rows * corpus.seq_len

    answer_passes(read_pass)


if __name__ == "__main__":
    main()
