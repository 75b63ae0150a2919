"""Reads batches through stock webdataset, one document a member: what a first WebDataset of tokens looks like."""

import io
import sys
from pathlib import Path

import numpy as np
import torch
from peer_loop import Corpus, answer_passes
from webdataset import TarWriter, WebDataset


def write_documents(corpus: Corpus, path: Path) -> None:
    """A tar with a .npy member for each document."""
    with TarWriter(str(path), encoder=False) as writer:
        for number, document in enumerate(corpus.documents()):
            buffer = io.BytesIO()
            np.save(buffer, document)
            writer.write({"__key__": f"{number:09d}", "npy": buffer.getvalue()})


def main() -> None:
    corpus = Corpus(Path(sys.argv[1]), int(sys.argv[2]))
    path = corpus.folder / "documents-000000.tar"
    write_documents(corpus, path)

    def read_pass() -> int:
        parts, size, num_rows = [], 0, 0
        batch_tokens = corpus.batch_rows * corpus.seq_len
        for sample in WebDataset([str(path)], shardshuffle=False, nodesplitter=None).decode():
            parts.append(sample["npy"])
            size += len(parts[-1])
            if size > batch_tokens:
                tokens = np.concatenate(parts)
                for first in range(0, size - batch_tokens, batch_tokens):
                    for shift in (0, 1):
                        rows = tokens[first + shift : first + shift + batch_tokens].astype(np.int64)
                        torch.from_numpy(rows.reshape(corpus.batch_rows, corpus.seq_len))
                    num_rows += corpus.batch_rows
                    used = first + batch_tokens
                parts, size = [tokens[used:]], size - used
        return num_rows * corpus.seq_len

    answer_passes(read_pass)


if __name__ == "__main__":
    main()
