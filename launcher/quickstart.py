"""The main job, end to end: a corpus that every machine has, a model trained on it, text from the model, a report.

Each part is skipped when it is done and goes on where it was, so the command can be stopped and started at will.
"""

import time
from pathlib import Path

from rich.console import Console

from data_tools.build import build_corpus
from data_tools.corpora import find_source
from data_tools.settings import BuildSettings
from launcher.baselines import fit_baselines
from launcher.generate import Drawing, generate_text
from launcher.local import count_cores, count_gpus
from launcher.train import start_training
from megascale.config.load import load_config
from megascale.errors import ConfigError
from megascale.observe.report import write_report
from megascale.observe.run_files import SAMPLE_FILE, BaselineFit, read_metrics

CONFIG = Path("configs/quickstart.yaml")
SOURCE = "python-stdlib"
VALIDATION_FRACTION = 0.02
"""Of 30 MB of text: enough tokens for a stable loss, few enough to evaluate them all in seconds on a CPU."""
MAX_RANKS = 2
"""So that there is something to share out; fewer where there is but one GPU."""
PROMPT = 'import os\n\n\ndef read_lines(path):\n    """'
NUM_PARTS = 4


def run_quickstart() -> None:
    """Builds the corpus, trains, samples and reports.

    Raises:
        MegascaleError: a part failed, or the training was asked to stop and is saved.
    """
    if not CONFIG.exists():
        raise ConfigError(f"{CONFIG} is not here; run the quickstart in a checkout of megascale")
    config = load_config(CONFIG)
    run_folder, started_s = Path(config.run.folder), time.perf_counter()
    _announce(1, f"corpus: the source of Python's standard library, in {config.data.folder}")
    settings = BuildSettings(vocab_size=config.model.vocab_size, validation_fraction=VALIDATION_FRACTION)
    corpus = build_corpus(
        find_source(SOURCE), Path(config.data.folder), settings, count_cores(), Console(stderr=True)
    )
    print(corpus.describe())
    num_ranks = min(MAX_RANKS, count_gpus() or MAX_RANKS)
    _announce(2, f"training: {config.train.max_steps} steps on {num_ranks} ranks, ZeRO-{config.parallel.zero_stage}")
    start_training(CONFIG, [], num_ranks)
    _announce(3, "baselines: n-gram models fitted on the tokens that the run has read")
    fit = fit_baselines(run_folder)
    _announce(4, "sample and report")
    sample = generate_text(
        run_folder, [PROMPT], Drawing(max_tokens=200, temperature=0.8, top_k=50, top_p=None, seed=0), capture=True
    )
    (run_folder / SAMPLE_FILE).write_text(sample, encoding="utf-8")
    print(sample)
    report = write_report(run_folder)
    _print_verdict(run_folder, fit)
    print(f"{report} has the curves. This took {time.perf_counter() - started_s:.0f} s")


def _announce(part: int, what: str) -> None:
    print(f"\n[{part}/{NUM_PARTS}] {what}", flush=True)


def _print_verdict(run_folder: Path, fit: BaselineFit) -> None:
    """Our validation loss beside the baselines', all on the whole validation split."""
    last = [line for line in read_metrics(run_folder) if line["kind"] == "eval"][-1]
    bits_per_nat = last["bits_per_byte"] / last["loss"]
    print(f"\nvalidation loss after {last['step']} steps, {fit.num_tokens:,} tokens read:")
    for name, loss in {**fit.losses, "this model": last["loss"]}.items():
        print(f"  {name:>10}  {loss:.4f} nats per token  {loss * bits_per_nat:.4f} bits per byte")
