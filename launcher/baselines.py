"""N-gram baselines of a run: models of one to three tokens, fitted on exactly the tokens that the run has read."""

import time
from pathlib import Path

from data_tools.ngram import fit_ngrams
from megascale.config.load import load_config
from megascale.config.schema import RunConfig
from megascale.data.order import RowOrder
from megascale.data.rows import CorpusRows, open_rows, rows_read
from megascale.errors import CheckpointError
from megascale.observe.run_files import CONFIG_FILE, BaselineFit, read_metrics, write_baselines


def fit_baselines(run_folder: Path) -> BaselineFit:
    """Fits the baselines, evaluates them on the whole validation split and writes `baselines.json`.

    Raises:
        CheckpointError: the folder holds no run that has logged a step.
    """
    steps = [line["step"] for line in read_metrics(run_folder)]
    if not steps:
        raise CheckpointError(f"{run_folder}: no run here has logged a step; train it first")
    config = load_config(run_folder / CONFIG_FILE)
    train_rows, validation_rows = (_open(config, split) for split in ("train", "validation"))
    started_s = time.perf_counter()
    num_rows = max(steps) * (config.train.global_batch_tokens // config.train.seq_len)
    order = RowOrder(train_rows.rows_per_shard, config.run.seed, config.data.num_lanes, config.data.window_rows)
    read = list(rows_read(train_rows, order, 0, num_rows))
    model = fit_ngrams(read, config.model.vocab_size)
    losses = model.evaluate(
        validation_rows.read(*validation_rows.locate_unshuffled(number)) for number in range(validation_rows.num_rows)
    )
    fit = BaselineFit(step=max(steps), num_tokens=sum(len(row) - 1 for row in read), losses=losses)
    write_baselines(run_folder, [fit])
    print(f"baselines fitted on {fit.num_tokens:,} tokens in {time.perf_counter() - started_s:.1f} s: "
          + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    return fit


def _open(config: RunConfig, split: str) -> CorpusRows:
    return open_rows(config.data.folder, split, config.train.seq_len, config.model.vocab_size)
