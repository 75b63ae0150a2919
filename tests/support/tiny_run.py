"""A tiny run through the real command line: config, corpus, and what it left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from tests.support.ranks import REPOSITORY

TINY_CONFIG = """\
run: {{name: tiny, folder: {run_folder}, seed: 3}}
model:
  {{family: llama, num_layers: 2, d_model: 32, num_heads: 2, d_ff: 64, vocab_size: 64, max_seq_len: 32, dropout: 0.1}}
data: {{folder: {corpus}, window_rows: 16, num_lanes: 4}}
train: {{seq_len: 32, micro_batch_size: 2, global_batch_tokens: 256, max_steps: 12}}
optimizer: {{learning_rate: 3e-3, warmup_steps: 2, clip_norm: 0.5}}
precision: {{dtype: fp32}}
parallel: {{zero_stage: 1}}
evaluate: {{interval_steps: 4, max_rows: 8}}
checkpoint: {{interval_steps: 3, keep_last: 3}}
observe: {{wandb: {{mode: disabled}}}}
"""


def write_config(folder: Path, corpus: Path, name: str = "run") -> Path:
    """Writes the tiny config for a run folder `folder/name`."""
    path = folder / f"{name}.yaml"
    path.write_text(TINY_CONFIG.format(run_folder=folder / name, corpus=corpus))
    return path


def write_blend(folder: Path, name: str = "run", corpora: Path | str | None = None) -> Path:
    """Writes the config of a run `folder/name` over a blend of `code` and `web` in `corpora`, by default `folder`.

    9 steps of 12 rows of 32 tokens, in micro-batches of one row, saved every 3 steps.
    """
    corpora = corpora or folder
    path = folder / f"{name}.yaml"
    config = yaml.safe_load(TINY_CONFIG.format(run_folder=folder / name, corpus="unused"))
    config["data"] = {"window_rows": 16, "num_lanes": 4, "packing": "bestfit", "corpora": {
        "code": {"folder": f"{corpora}/code", "weight": 1.0}, "web": {"folder": f"{corpora}/web", "weight": 3.0},
    }}
    config["train"] |= {"micro_batch_size": 1, "global_batch_tokens": 384, "max_steps": 9}
    path.write_text(yaml.safe_dump(config))
    return path


def megascale(*arguments: str, timeout_s: float = 240, **environment: str) -> subprocess.CompletedProcess:
    """Runs the command line to its end; standard output and error as text."""
    return subprocess.run(
        command(*arguments), env=command_environment(**environment), cwd=REPOSITORY, capture_output=True, text=True,
        timeout=timeout_s, check=False,
    )


def start_megascale(*arguments: str, **environment: str) -> subprocess.Popen:
    """Starts the command line, its output going to one pipe."""
    return subprocess.Popen(
        command(*arguments), env=command_environment(**environment), cwd=REPOSITORY, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )


def command(*arguments: str) -> list[str]:
    """The command line as a list for subprocess."""
    return [sys.executable, "-m", "launcher", *map(str, arguments)]


def command_environment(**environment: str) -> dict[str, str]:
    """A test's environment: no GPU, one thread per rank, no W&B of the user's."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return inherited | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment}


def read_metrics(run_folder: Path) -> list[dict]:
    """The lines of metrics.jsonl that tell of steps and evaluations, in order; what tells of time is left out."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] != "goodput"]


def curve(run_folder: Path) -> list[tuple]:
    """What must not depend on interruptions: (kind, step, loss, gradient norm, tokens), to the bit."""
    return [
        (line["kind"], line["step"], line["loss"], line.get("grad_norm"), line.get("tokens_seen"))
        for line in read_metrics(run_folder)
    ]
