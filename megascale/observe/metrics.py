"""The three records that a run logs, and how they look in `metrics.jsonl` and in W&B."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class TrainRecord:
    """One logged optimizer step.

    Attributes:
        step: number of completed steps, counted from the start of the run, through all resumes.
        loss: mean negative log-likelihood per label token over the step's global batch, in nats.
        learning_rate: learning rate of the step.
        grad_norm: L2 norm of the whole gradient before clipping.
        tokens_seen: label tokens that the run has trained on so far, this step included.
        step_s: seconds per step, and
        tokens_per_s: tokens per second over all ranks, both over the last steps (evaluation and saves left out): label
            tokens where the next token is learned, elsewhere input positions, of an image its patches.
        mfu_fraction: model FLOPs per second over the peak of the devices; None when the peak isn't known.
        eta_s: seconds of training left at this speed; None before the first measured step.
        loss_scale: fp16 loss scale of the step; 1.0 in other precisions.
        is_skipped: whether a non-finite value made the engine leave the parameters as they were.
        unix_s: wall-clock time of the record.
        ledger: tokens that the run has read so far, by corpus.
        figures: what else the model tells of itself, by names with slashes, such as `experts/0/load_max`.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_seen: int
    step_s: float
    tokens_per_s: float
    mfu_fraction: float | None
    eta_s: float | None
    loss_scale: float
    is_skipped: bool
    unix_s: float
    ledger: dict[str, int] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CorpusEval:
    """What an evaluation found on one corpus of several; the fields mean what they mean in `EvalRecord`."""

    loss: float
    num_tokens: int
    bits_per_byte: float | None


@dataclass(frozen=True)
class EvalRecord:
    """One evaluation on the validation split; the first four fields are as in `build_eval_record`.

    Attributes:
        perplexity: exp(loss); infinite where that leaves the range of a float, None where the loss isn't of tokens.
        bits_per_byte: loss in bits per byte of text, comparable between tokenizers; None when the bytes aren't known.
        corpora: the same for each corpus of a blend; empty where there is one corpus.
        ema_loss: `loss` of the averaged weights; None where they aren't evaluated.
    """

    step: int
    loss: float
    num_tokens: int
    eval_s: float
    perplexity: float | None
    bits_per_byte: float | None
    unix_s: float
    corpora: dict[str, CorpusEval] = field(default_factory=dict)
    ema_loss: float | None = None


def build_eval_record(
    step: int, loss: float, num_tokens: int, num_bytes: int | None, eval_s: float, unix_s: float,
    corpora: Mapping[str, CorpusEval] | None = None, is_of_tokens: bool = True,
) -> EvalRecord:
    """Derives perplexity and bits per byte.

    Args:
        step: completed steps of the evaluated model.
        loss: mean negative log-likelihood per label token, in nats.
        num_tokens: label tokens evaluated.
        num_bytes: bytes of UTF-8 text that those tokens stand for, or None when that isn't known.
        eval_s: seconds that the evaluation took.
        unix_s: wall-clock time.
        corpora: what each corpus of several comes to.
        is_of_tokens: whether perplexity means anything.
    """
    perplexity = None if not is_of_tokens else math.exp(loss) if loss < 700.0 else math.inf
    bits_per_byte = derive_bits_per_byte(loss, num_tokens, num_bytes)
    return EvalRecord(step, loss, num_tokens, eval_s, perplexity, bits_per_byte, unix_s, dict(corpora or {}))


def derive_bits_per_byte(loss: float, num_tokens: int, num_bytes: int | None) -> float | None:
    """A loss in nats per token as bits per byte of the text that the tokens stand for, if its size is known."""
    return loss / math.log(2.0) * num_tokens / num_bytes if num_bytes else None


@dataclass(frozen=True)
class Goodput:
    """Where the wall time of a run went, from the begin of its first session, through all restarts, in seconds.

    Attributes:
        step: completed steps of the run.
        compute_s: steps that count, waiting for other ranks included.
        lost_s: steps that a fault took back, so that they're taken twice.
        data_s: waiting for the rows of a step.
        save_s: what training waited for while it saved.
        evaluate_s: evaluations.
        startup_s: from the start of the process to the loaded state.
        other_s: logging, ending, and what else a session does.
        down_s: between sessions: noticing a fault, queueing, and what no session told of before it was killed.
        wall_s: all of these.
        steps_kept: steps that count.
        steps_redone: steps lost.
        num_sessions: that have come as far as to train.
        goodput_fraction: compute_s over wall_s.
        unix_s: wall-clock time until which it counts.
    """

    step: int
    compute_s: float
    lost_s: float
    data_s: float
    save_s: float
    evaluate_s: float
    startup_s: float
    other_s: float
    down_s: float
    wall_s: float
    steps_kept: int
    steps_redone: int
    num_sessions: int
    goodput_fraction: float
    unix_s: float

    def parts(self) -> dict[str, float]:
        """The seconds of each part by its name for people; they add up to `wall_s`."""
        return {
            "training": self.compute_s,
            "lost and redone": self.lost_s,
            "waiting for data": self.data_s,
            "saving": self.save_s,
            "evaluation": self.evaluate_s,
            "start-up": self.startup_s,
            "other": self.other_s,
            "down": self.down_s,
        }


KINDS = {TrainRecord: "train", EvalRecord: "eval", Goodput: "goodput"}
"""What `kind` says of a line of `metrics.jsonl`."""


def to_json_line(record: TrainRecord | EvalRecord | Goodput) -> str:
    """Renders a record as one line of strict JSON; floats survive to the bit, NaN and infinity become null."""
    fields = {"kind": KINDS[type(record)], **asdict(record)}
    return json.dumps(_finite(fields), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def merge_rows(lines: list[dict]) -> list[tuple[int, dict]]:
    """Merges the lines of each step into one W&B row `{"train/loss": .., "eval/loss": ..}`, ordered by step.

    What a line has of each corpus becomes `train/tokens/NAME` and `eval/NAME/loss`, its figures `train/NAME`.
    """
    rows: dict[int, dict] = {}
    for line in lines:
        row = rows.setdefault(line["step"], {})
        for name, value in line.items():
            if name == "unix_s":
                row["_timestamp"] = value
            elif name == "ledger":
                row |= {f"train/tokens/{corpus}": tokens for corpus, tokens in value.items()}
            elif name == "figures":
                row |= {f"train/{figure}": number for figure, number in value.items() if number is not None}
            elif name == "corpora":
                row |= {f"eval/{corpus}/{metric}": number for corpus, metrics in value.items()
                        for metric, number in metrics.items() if number is not None}
            elif name not in ("kind", "step") and value is not None:
                row[f"{line['kind']}/{name}"] = value
    return sorted(rows.items())
