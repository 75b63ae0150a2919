"""Reads batches through MosaicML's StreamingDataset: run by an interpreter that has mosaicml-streaming.

Its samples are rows of seq_len + 1 tokens, cut when the data is written, without documents. torchvision, which it
imports for image datasets, is left out: builds of it for another torch don't load.
"""

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from peer_loop import Corpus, answer_passes


def leave_out_torchvision() -> None:
    """Puts empty modules in its place."""
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__spec__ = ModuleSpec(name, None)
    sys.modules["torchvision.datasets"].VisionDataset = object
    sys.modules["torchvision.transforms.functional"].to_tensor = None
    sys.modules["torchvision.transforms"].functional = sys.modules["torchvision.transforms.functional"]


def main() -> None:
    leave_out_torchvision()
    from streaming import MDSWriter, StreamingDataset

    corpus = Corpus(Path(sys.argv[1]), int(sys.argv[2]))
    folder = str(corpus.folder / "mds")
    tokens = np.fromfile(corpus.folder / "raw.bin", np.uint16)[: corpus.num_tokens]
    with MDSWriter(out=folder, columns={"tokens": "bytes"}) as writer:
        for start in range(0, len(tokens) - corpus.seq_len, corpus.seq_len):
            writer.write({"tokens": tokens[start : start + corpus.seq_len + 1].tobytes()})
    dataset = StreamingDataset(local=folder, shuffle=True, shuffle_algo="py1e", batch_size=corpus.batch_rows)

    def read_pass() -> int:
        rows, num_rows = [], 0
        for sample in dataset:
            rows.append(torch.from_numpy(np.frombuffer(sample["tokens"], np.uint16).astype(np.int64)))
            if len(rows) == corpus.batch_rows:
                both_BT = torch.stack(rows)
                _ = both_BT[:, :-1].contiguous(), both_BT[:, 1:].contiguous()
                num_rows += len(rows)
                rows = []
        return num_rows * corpus.seq_len

    answer_passes(read_pass)


if __name__ == "__main__":
    main()
