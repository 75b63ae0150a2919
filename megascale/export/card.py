"""The model card of an export: what the checkpoint knows of the run, as Markdown. Pure.

It is meant to be published, so it holds no folders, urls or names of machines; and no license, which no run knows.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from megascale.checkpoint.index import CheckpointIndex, LineageRecord
from megascale.config.model import ModelConfig
from megascale.model.flops import num_parameters
from megascale.observe.units import Units, units_of

PRIVATE_KEYS = ("run.folder", "data.", "checkpoint.", "observe.")
"""Keys of the config whose changes are not told: where things lie, not what was computed."""

USE_TEXT = """```python
from transformers import AUTO, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")  # the folder of this file
model = AUTO.from_pretrained("PATH")
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
    units = units_of(run.config)
    task, what = _purpose(model)
    parts = [
        f"---\nlibrary_name: transformers\npipeline_tag: {task}\ntags:\n- megascale\n"
        f"- {hf_config['model_type']}\n---",
        f"# {_cell(run.config['run']['name'])}",
        f"A {hf_config['architectures'][0]} of {num_parameters(model, has_padding=False):,} parameters, pretrained with"
        f" megascale {run.code.get('megascale', '')} for {state.step:,} steps on {state.tokens:,} {units.labels}."
        f" Exported from the checkpoint of that step. {what}",
        "## Use", *_use(model, hf_config, run.config["train"]["seq_len"]),
        "## Model", _table(("setting", "value"), _settings(run.config["model"])),
        "## Data", _data_table(index, units),
        f"{state.rows:,} rows in all, {state.tokens:,} {units.labels} with a label. Digest of the stream:"
        f" `{state.stream_digest}`.",
        "## Losses", _losses(index, metrics, units),
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


def _purpose(model: ModelConfig) -> tuple[str, str]:
    """The hub's name of what the model is for, and a sentence."""
    if model.vision is not None:
        return "image-classification", "It tells the class of an image."
    if model.traits.has_decoder:
        return "text2text-generation", "It is a base model: its decoder writes what its training asked for."
    if not model.traits.is_causal:
        return "fill-mask", "It is a base model: it tells masked tokens."
    return "text-generation", "It is a base model: it continues text."


def _use(model: ModelConfig, hf_config: Mapping[str, Any], seq_len: int) -> list[str]:
    """How to load it, and how its rows look."""
    if model.vision is not None:
        return [USE_IMAGES]
    end, sizes = hf_config["eos_token_id"], f"The longest sequence is {model.max_seq_len:,} tokens; training rows had"
    if model.traits.has_decoder:
        auto, ends = "AutoModelForSeq2SeqLM", f"The decoder begins after, and ends with, token {end}."
    elif not model.traits.is_causal:
        auto = "AutoModelForPreTraining" if model.pair_head else "AutoModelForMaskedLM"
        ends = f"Token {end} pads rows."
    else:
        auto, ends = "AutoModelForCausalLM", f"A text begins after, and ends with, token {end}."
    return [USE_TEXT.replace("AUTO", auto), f"{ends} {sizes} {seq_len:,}."]


def _data_table(index: CheckpointIndex, units: Units) -> str:
    """What was read of each corpus, and what it was."""
    rows = []
    for name, corpus in index.run.stream.corpora.items():
        read = index.state.ledger.get(name)
        rows.append((
            name, f"{read.tokens:,}" if read else 0, f"{read.rows:,}" if read else 0,
            f"{corpus.fim_fraction:g}", corpus.fingerprint, index.run.validation.get(name, ""),
        ))
    header = ("corpus", f"{units.read} read", "rows", "fill in the middle", "training split", "validation split")
    return _table(header, rows)


def _losses(index: CheckpointIndex, metrics: Sequence[Mapping[str, Any]], units: Units) -> str:
    """The last losses up to the step."""
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
    return _table(("loss", "step", units.loss, "bits per byte"), rows) if rows else "Never evaluated."


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
