"""N-gram baselines of a run: models of one to three tokens, fitted on exactly the tokens that the run has read."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_tools.ngram import fit_ngrams
from megascale.config.derive import derive
from megascale.config.layout_rules import num_model_ranks
from megascale.config.load import load_config
from megascale.data.stream import Stream, open_stream, open_validation
from megascale.errors import CheckpointError
from megascale.observe.run_files import CONFIG_FILE, BaselineFit, read_metrics, write_baselines

ROWS_AT_ONCE = 1024
"""Rows that are located in one call, which spreads its fixed cost."""


def fit_baselines(run_folder: Path) -> BaselineFit:
    """Fits the baselines, evaluates them on the whole validation splits and writes `baselines.json`.

    Raises:
        CheckpointError: the folder holds no run that has logged a step.
    """
    steps = [line["step"] for line in read_metrics(run_folder)]
    if not steps:
        raise CheckpointError(f"{run_folder}: no run here has logged a step; train it first")
    config = load_config(run_folder / CONFIG_FILE)
    derived = derive(config, num_model_ranks(config.parallel))
    started_s = time.perf_counter()
    read = list(rows_read(open_stream(config, derived), derived.batches.first_row(max(steps))))
    model = fit_ngrams(read, config.model.vocab_size)
    losses = model.evaluate(
        corpus.read(*corpus.locate_unshuffled(number)).tokens
        for corpus in open_validation(config) for number in range(corpus.num_rows)
    )
    fit = BaselineFit(step=max(steps), num_tokens=sum(len(row) - 1 for row in read), losses=losses)
    write_baselines(run_folder, [fit])
    print(f"baselines fitted on {fit.num_tokens:,} tokens in {time.perf_counter() - started_s:.1f} s: "
          + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    return fit


def rows_read(stream: Stream, num_rows: int) -> Iterator[np.ndarray]:
    """Yields the tokens of the first rows of a run, those that were masked left out."""
    for first in range(0, num_rows, ROWS_AT_ONCE):
        rows = stream.read(np.arange(first, min(first + ROWS_AT_ONCE, num_rows))).rows
        yield from (row.tokens for row in rows if row)
