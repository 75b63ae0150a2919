"""A tiny model and random rows for tests that need something to train on, without files."""

from collections.abc import Sequence
from types import SimpleNamespace

import torch

from megascale.config.model import ModelConfig
from megascale.data.batch import Batch
from megascale.engine import build
from megascale.engine.ds_config import deepspeed_config

TINY_LLAMA = ModelConfig(
    family="llama", num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, d_ff=48, vocab_size=61, max_seq_len=32
)

ODD_GPT2 = ModelConfig(family="gpt2", num_layers=2, d_model=33, num_heads=3, vocab_size=61, max_seq_len=32)
"""Its parameters don't divide by the number of ranks: every partition needs padding."""


END_OF_DOCUMENT = 7


def random_rows(vocab_size: int, num_rows: int, seq_len: int, seed: int) -> SimpleNamespace:
    """Learnable rows (each odd token repeats the one before); the last label tokens of row i are padding, i % 3."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab_size, (num_rows, seq_len + 1), generator=generator)
    tokens[:, 1::2] = tokens[:, 0:-1:2]
    labels = tokens[:, 1:].clone()
    for row in range(num_rows):
        if row % 3:
            labels[row, -(row % 3):] = -100
    return SimpleNamespace(tokens=tokens[:, :-1].contiguous(), labels=labels)


def batch_of_rows(rows: SimpleNamespace, numbers: Sequence[int]) -> Batch:
    """A batch of some of the rows; END_OF_DOCUMENT is the last token of its document."""
    index = torch.tensor(list(numbers))
    tokens_BT = rows.tokens[index]
    return Batch(tokens_BT, rows.labels[index], number_documents(tokens_BT, END_OF_DOCUMENT), row_numbers_B=index)


def number_documents(tokens_BT: torch.Tensor, end_id: int) -> torch.Tensor:
    """Number of the document of each position, int32, from 0 in each row; the token `end_id` is its document's last."""
    is_end_BT = (tokens_BT == end_id).int()
    return (is_end_BT.cumsum(dim=1) - is_end_BT).int()


def gap(expected: float, found: float) -> float:
    """Difference, relative where the value is over 1: fp32 has no more digits than that."""
    return abs(expected - found) / max(1.0, abs(expected))


def share_small_parameters() -> None:
    """Makes ZeRO-3 in this process share out small parameters too.

    DeepSpeed keeps parameters under 1e5 elements whole, and a tiny model has no others.
    """
    def config_for_small_parameters(**settings) -> dict:
        config = deepspeed_config(**settings)
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return config

    build.deepspeed_config = config_for_small_parameters
