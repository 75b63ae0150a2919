"""The model card of an export: what the checkpoint knows of the run, as Markdown. Pure.

It is meant to be published, so it holds no folders, urls or names of machines; and no license, which no run knows.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from megascale.checkpoint.index import CheckpointIndex, LineageRecord
from megascale.config.model import ModelConfig
from megascale.model.flops import num_parameters

PRIVATE_KEYS = ("run.folder", "data.", "checkpoint.", "observe.")
"""Keys of the config whose changes are not told: where things lie, not what was computed."""

USE_TEXT = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")  # the folder of this file
model = AutoModelForCausalLM.from_pretrained("PATH")
```"""
USE_IMAGES = """```python
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("PATH")  # the folder of this file
model = AutoModelForImageClassification.from_pretrained("PATH")
```"""


def write_card(index: CheckpointIndex, hf_config: Mapping[str, Any], metrics: Iterable[Mapping[str, Any]]) -> str:
    """The text of `README.md`.

    Args:
        hf_config: values of `config.json`.
        metrics: lines of `metrics.jsonl`, which may go beyond the checkpoint or be missing.
    """
    run, state = index.run, index.state
    model = ModelConfig(**run.config["model"])
    metrics = [line for line in metrics if line["step"] <= state.step]
    if model.vision is not None:
        task, what, use = "image-classification", "It tells the class of an image.", [USE_IMAGES]
        unit = labels = "images"
    else:
        task, what, use = "text-generation", "It is a base model: it continues text.", [
            USE_TEXT,
            f"A text begins after, and ends with, token {hf_config['eos_token_id']}. The longest sequence is"
            f" {model.max_seq_len:,} tokens; training rows had {run.config['train']['seq_len']:,}.",
        ]
        unit, labels = "tokens", "label tokens"
    parts = [
        f"---\nlibrary_name: transformers\npipeline_tag: {task}\ntags:\n- megascale\n"
        f"- {hf_config['model_type']}\n---",
        f"# {_cell(run.config['run']['name'])}",
        f"A {hf_config['architectures'][0]} of {num_parameters(model, has_padding=False):,} parameters, pretrained with"
        f" megascale {run.code.get('megascale', '')} for {state.step:,} steps on {state.tokens:,} {unit}. Exported from"
        f" the checkpoint of that step. {what}",
        "## Use", *use,
        "## Model", _table(("setting", "value"), _settings(run.config["model"])),
        "## Data", _data_table(index),
        f"{state.rows:,} rows in all, {state.tokens:,} {labels}. Digest of the stream: `{state.stream_digest}`.",
        "## Losses", _losses(index, metrics),
        "## Training", _table(("setting", "value"), [
            *_settings(run.config["optimizer"]), *_settings(run.config["precision"]),
            *_settings({name: run.config["train"][name] for name in ("seq_len", "global_batch_tokens", "max_steps")}),
            ("seed", run.config["run"]["seed"]), ("steps whose update was withheld", state.skipped_steps),
        ]),
        "## Where the weights come from", _lineage(run.lineage),
        "## Code", _table(("what", "version"), [*run.code.items(), ("config fingerprint", run.config_fingerprint),
                                               ("run", run.run_id)]),
    ]
    return "\n\n".join(parts) + "\n"


def _data_table(index: CheckpointIndex) -> str:
    """What was read of each corpus, and what it was."""
    rows = []
    for name, corpus in index.run.stream.corpora.items():
        read = index.state.ledger.get(name)
        rows.append((
            name, f"{read.tokens:,}" if read else 0, f"{read.rows:,}" if read else 0,
            f"{corpus.fim_fraction:g}", corpus.fingerprint, index.run.validation.get(name, ""),
        ))
    header = ("corpus", "tokens read", "rows", "fill in the middle", "training split", "validation split")
    return _table(header, rows)


def _losses(index: CheckpointIndex, metrics: Sequence[Mapping[str, Any]]) -> str:
    """The last losses up to the step, in nats per token."""
    state, rows = index.state, []
    trained = [line for line in metrics if line["kind"] == "train"]
    evaluated = [line for line in metrics if line["kind"] == "eval"]
    if trained:
        rows.append(("training, one batch", trained[-1]["step"], _number(trained[-1].get("loss")), ""))
    if evaluated:
        last = evaluated[-1]
        rows.append(("validation", last["step"], _number(last.get("loss")), _number(last.get("bits_per_byte"))))
        rows += [
            (f"validation, {name}", last["step"], _number(part.get("loss")), _number(part.get("bits_per_byte")))
            for name, part in (last.get("corpora") or {}).items()
        ]
    elif state.validation_loss is not None:
        rows.append(("validation", state.evaluated_step, _number(state.validation_loss), ""))
    return _table(("loss", "step", "nats per token", "bits per byte"), rows) if rows else "Never evaluated."


def _lineage(lineage: Sequence[LineageRecord]) -> str:
    """The turns of the run's history, without the folders in it."""
    if not lineage:
        return "Trained from random initial values, by one config."
    lines = []
    for turn in lineage:
        source = f" of run {turn.run_id}" if turn.run_id else f" of {PurePosixPath(turn.source).name}"
        changes = [str(change) for change in turn.changes if not change.key.startswith(PRIVATE_KEYS)]
        lines.append(f"- {turn.kind} at step {turn.step:,}{source}" + "".join(f"\n  - {_cell(c)}" for c in changes))
    return "\n".join(lines)


def _settings(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in values.items() if value is not None]


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else ""


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(value: Any) -> str:
    """A value that can't end its cell or begin markup."""
    return str(value).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
