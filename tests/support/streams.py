"""Streams over tiny corpora, opened from a config as a run opens them."""

from pathlib import Path

from megascale.config.derive import derive
from megascale.config.load import parse_config
from megascale.config.schema import RunConfig
from megascale.data.stream import Stream, open_stream


def stream_config(corpora: Path | dict[str, dict], *, data: dict | None = None, train: dict | None = None,
                  seed: int = 1, vocab_size: int = 97) -> RunConfig:
    """A run's config of which the data path is of interest: rows of 24 tokens, steps of 12 rows, small lanes.

    Args:
        corpora: folder of the only corpus, or the section `data.corpora`.
        data, train: what these sections say beside the defaults here.
    """
    which = {"corpora": corpora} if isinstance(corpora, dict) else {"folder": str(corpora)}
    return parse_config({
        "run": {"name": "stream", "folder": "unused", "seed": seed},
        "model": {"family": "gpt2", "num_layers": 1, "d_model": 8, "num_heads": 1, "vocab_size": vocab_size,
                  "max_seq_len": 24},
        "data": which | {"num_lanes": 8, "window_rows": 20} | (data or {}),
        "train": {"seq_len": 24, "micro_batch_size": 1, "global_batch_tokens": 288, "max_steps": 10} | (train or {}),
        "optimizer": {"learning_rate": 1e-3},
        "evaluate": {"interval_steps": 1000},
        "checkpoint": {"interval_steps": 1000},
    }, source="stream")


def open_test_stream(config: RunConfig) -> Stream:
    """The stream of a config on one rank."""
    return open_stream(config, derive(config, 1))
